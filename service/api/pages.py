"""OpenAI's list bodies and the query parameters that page through them. Knows no table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import Query, Request

from service.errors import InvalidRequestError

After = Annotated[str | None, Query(max_length=128)]
Limit = Annotated[int, Query(ge=1, le=100)]


def list_body(data: Sequence[dict[str, Any]], *, has_more: bool = False) -> dict[str, Any]:
    """`{"object": "list", …}`; `last_id` is what the next request's `after` names."""
    return {
        "object": "list",
        "data": list(data),
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


def only_query(*names: str, prefixes: tuple[str, ...] = ()) -> Callable[[Request], None]:
    """A dependency: any other query parameter is a 400 that names it, and so is one given twice."""

    def check(request: Request) -> None:
        seen = [name for name, _ in request.query_params.multi_items()]
        for name in seen:
            if name not in names and not name.startswith(prefixes or ("\0",)):
                raise InvalidRequestError(
                    f"Unrecognized query parameter: '{name}'.", param=name, code="unknown_parameter"
                )
            if seen.count(name) > 1:
                raise InvalidRequestError(f"Query parameter '{name}' was given more than once.", param=name)

    return check
