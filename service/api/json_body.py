"""JSON bodies, read strictly: what Python's parser would pass over in silence is a 400 that names it. Knows no field.

A key given twice (one value would be dropped), NaN and Infinity (no JSON), halves of surrogate pairs (no text), NUL
characters (which no database column takes) and nesting without end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from service.api.wire import field_path
from service.errors import InvalidRequestError

_SUSPICIOUS = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
"""Escapes of NUL or of a surrogate; nothing else can bring one into a parsed string."""


class _JsonRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = read_json(await self.body())
        return self._json


class JsonRoute(APIRoute):
    """A route that reads its body by `read_json`; every router's `route_class`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return strictly


def read_json(body: bytes) -> Any:
    """The value. Raises json.JSONDecodeError for what is no JSON, InvalidRequestError for what is not taken as such."""
    try:
        value = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise InvalidRequestError("The JSON body is nested too deeply.", code="invalid_json") from None
    except UnicodeDecodeError:
        raise InvalidRequestError("The body is not UTF-8.", code="invalid_json") from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        raise InvalidRequestError("The JSON body holds a number of too many digits.", code="invalid_json") from None
    if _SUSPICIOUS.search(body):
        for where, text in _texts(value):
            _check(where, text)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = _printable(next(name for name in names if names.count(name) > 1))
        raise InvalidRequestError(f"'{twice}' is given twice in one object.", param=twice, code="invalid_json")
    return value


def _constant(name: str) -> None:
    raise InvalidRequestError(f"{name} is no JSON number.", code="invalid_json")


def _check(where: tuple[int | str, ...], text: str) -> None:
    param = _printable(field_path(where)) or None
    if "\0" in text:
        raise InvalidRequestError(f"'{param}' holds a NUL character.", param=param, code="invalid_value")
    try:
        text.encode()
    except UnicodeEncodeError:
        reason = "holds half of a surrogate pair, which is no text"
        raise InvalidRequestError(f"'{param}' {reason}.", param=param, code="invalid_value") from None


def _texts(root: Any) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Every string and every key, with its place. Without recursion: a value may be as deep as the parser goes."""
    todo: list[tuple[tuple[int | str, ...], Any]] = [((), root)]
    while todo:
        where, value = todo.pop()
        if isinstance(value, str):
            yield where, value
        elif isinstance(value, dict):
            for key, item in value.items():
                yield (*where, key), key
                todo.append(((*where, key), item))
        elif isinstance(value, list):
            todo += [((*where, index), item) for index, item in enumerate(value)]


def _printable(text: str) -> str:
    """As an answer can carry it."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\u0000")[:200]
