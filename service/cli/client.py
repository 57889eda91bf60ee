"""The service as the command line sees it: one HTTP client, failures told in a line. Knows no command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.console import Console

REFUSED, USAGE, UNREACHABLE = 1, 2, 3
"""Exit statuses."""

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option("--url", envvar="ROOTSTOCK_URL", help="Where the service is.")]
ApiKey = Annotated[
    str, typer.Option("--api-key", envvar="ROOTSTOCK_API_KEY", help="The tenant's key.", show_default=False)
]
AdminKey = Annotated[
    str, typer.Option("--admin-key", envvar="ROOTSTOCK_ADMIN_KEY", help="The admin key.", show_default=False)
]

# No markup of rich's own: ids are full of ":one:" and "[…]", and shall be printed as they are.
console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, markup=False)


def fail(message: str, status: int = REFUSED) -> NoReturn:
    """Say what is wrong and end the command."""
    errors.print(f"error: {message}", style="red")
    raise typer.Exit(status)


class Service:
    """Requests to a running service, authorised with one key. Every failure ends the command with a message."""

    def __init__(self, url: str, key: str, key_variable: str) -> None:
        if not key:
            fail(f"a key is needed: set {key_variable}, or see --help", USAGE)
        base = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(base_url=base, headers={"authorization": f"Bearer {key}"}, timeout=60)

    def get(self, path: str, **params: Any) -> Any:
        return self.call("GET", path, params={name: value for name, value in params.items() if value is not None})

    def call(self, method: str, path: str, **request: Any) -> Any:
        """The decoded answer. `path` is below `/v1`."""
        return self._answer(method, path, **request).json()

    def download(self, path: str, **params: Any) -> bytes:
        """The answer's bytes."""
        return self._answer("GET", path, params=params, timeout=600).content

    def _answer(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, f"/v1{path}", **request)
        except httpx.InvalidURL as error:
            fail(f"{self._http.base_url} is no URL: {error}", USAGE)
        except httpx.HTTPError as error:
            fail(f"no answer from {self._http.base_url}: {error or type(error).__name__}", UNREACHABLE)
        if answer.is_success:
            return answer
        fail(f"{_message(answer)} ({answer.status_code}, request {answer.headers.get('x-request-id', '?')})")

    def close(self) -> None:
        self._http.close()


@contextmanager
def as_tenant(url: str, api_key: str) -> Iterator[Service]:
    yield from _closing(Service(url, api_key, "ROOTSTOCK_API_KEY"))


@contextmanager
def as_admin(url: str, admin_key: str) -> Iterator[Service]:
    yield from _closing(Service(url, admin_key, "ROOTSTOCK_ADMIN_KEY"))


def _closing(service: Service) -> Iterator[Service]:
    try:
        yield service
    finally:
        service.close()


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"unexpected answer: {answer.text[:200]}"


def interactive() -> bool:
    """Whether somebody watches: live bars are for terminals."""
    return console.is_terminal and os.environ.get("TERM") != "dumb"
