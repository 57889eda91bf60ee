"""What nobody has to turn on: no page for browsers, no open documentation, no code from outside."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import adapters
import service
from service.api.middleware import SECURITY_HEADERS
from tests.service.http_fixtures import Served

ORIGIN = {"origin": "https://evil.example", "access-control-request-method": "POST"}

ASKED = [
    ("GET", "/v1/models", True, 200),
    ("GET", "/v1/models", False, 401),
    ("GET", "/v1/models/none", True, 404),
    ("GET", "/v1/files/file-none/content", True, 404),
    ("GET", "/nowhere", False, 404),
    ("PATCH", "/v1/models", True, 405),
    ("POST", "/v1/chat/completions", True, 400),
    ("OPTIONS", "/v1/chat/completions", False, 405),
    ("OPTIONS", "/v1/models", True, 405),
]


@pytest.mark.parametrize(("method", "path", "known", "status"), ASKED)
def test_every_answer_has_the_headers_that_keep_it_private_and_none_that_opens_it_to_a_page(
    shared_service: Served, method: str, path: str, known: bool, status: int
) -> None:
    http = shared_service.http()
    if not known:
        del http.headers["authorization"]
    answer = http.request(method, path, headers=ORIGIN, content=b"{" if method == "POST" else None)
    assert answer.status_code == status, answer.text
    assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_a_stream_and_a_body_that_is_too_large_have_them_too(shared_service: Served) -> None:
    http = shared_service.http()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}
    large = http.post("/v1/chat/completions", content=b" " * (9 << 20))
    for answer, status in ((http.post("/v1/chat/completions", json=body), 200), (large, 413)):
        assert answer.status_code == status
        assert answer.headers["x-content-type-options"] == "nosniff" and "no-" in answer.headers["cache-control"]


def test_headers_that_are_too_large_are_answered_with_them_as_well(shared_service: Served) -> None:
    answer = httpx.get(f"{shared_service.url}/v1/models", headers={"x-long": "x" * 70_000})
    assert answer.status_code == 431
    assert answer.headers["cache-control"] == "no-store" and answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/metrics", "/livez", "/"]
)
def test_neither_documentation_nor_measures_are_on_the_apis_port(shared_service: Served, path: str) -> None:
    assert shared_service.http().get(path).status_code == 404
    assert httpx.get(f"{shared_service.url}{path}").status_code == 404


def _calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call in the two packages, with where it is."""
    for package in (service, adapters):
        assert package.__file__ is not None
        for path in Path(package.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield f"{path.name}:{node.lineno}", node


def test_no_call_trusts_code_or_opens_a_pickle() -> None:
    seen, unsafe = 0, []
    for where, call in _calls():
        name = ast.unparse(call.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            seen += 1
            unsafe += [where] if given.get("weights_only") != "True" else []
        if given.get("trust_remote_code", "False") != "False":
            unsafe.append(where)
        if name == "pickle.loads" and where.startswith("line.py"):
            continue  # between our own two processes, over a socket that nobody else has
        if name in ("pickle.load", "pickle.loads", "eval", "exec", "marshal.loads", "yaml.load", "yaml.unsafe_load"):
            unsafe.append(where)
    assert seen and unsafe == []


def test_a_base_is_read_with_remote_code_turned_off() -> None:
    """`trust_remote_code` stands in dictionaries, too, and is False in each."""
    assert service.__file__ is not None
    texts = [path.read_text() for path in Path(service.__file__).parent.rglob("*.py")]
    lines = [line.strip() for text in texts for line in text.splitlines() if "trust_remote_code" in line]
    assert lines and all('"trust_remote_code": False' in line for line in lines)
