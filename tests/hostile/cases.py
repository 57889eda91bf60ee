"""A hostile request and what has to come of it, as data. Knows no socket and no service."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BOUNDARY = "----hostile"
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Request:
    """As it goes over the wire. In path, body and headers `{key}`, `{model}`, `{file}`, … are the target's."""

    method: str = "POST"
    path: str = CHAT
    body: bytes = b""
    headers: Sequence[tuple[str, bytes]] = ()
    raw: bytes | None = None
    """All of it instead, for what is no HTTP."""
    authorized: bool = True
    admin: bool = False
    length: bytes | None = None
    """A `Content-Length` that lies; None for the true one."""


@dataclass(frozen=True)
class Case:
    """`status` is the answer's; from 400 on, `param` is the field that its error has to name, `says` a part of it."""

    name: str
    request: Request
    status: int = 400
    param: str | None = None
    says: str = ""
    shows: Mapping[str, Any] = field(default_factory=dict)
    """Of an answer below 400: what its JSON holds."""


def chat(**fields: Any) -> Request:
    """A chat request that is right but for `fields`."""
    message = {"role": "user", "content": "Hello"}
    return post(CHAT, {"model": "tiny", "messages": [message], "max_tokens": 1, **fields})


def chat_text(fields: str) -> Request:
    """The same, with fields that no JSON writer would write."""
    body = f'{{"model":"tiny","messages":[{{"role":"user","content":"Hello"}}],{fields}}}'
    return Request(body=body.encode(), headers=JSON)


def job(**fields: Any) -> Request:
    return post("/v1/fine_tuning/jobs", {"model": "tiny", "training_file": "{file}", **fields})


def post(path: str, value: Any, method: str = "POST", **options: Any) -> Request:
    return Request(method, path, json.dumps(value).encode(), JSON, **options)


def get(path: str, **options: Any) -> Request:
    return Request("GET", path, **options)


def form(path: str, *parts: bytes, boundary: str = BOUNDARY) -> Request:
    body = b"".join(b"--" + boundary.encode() + b"\r\n" + part + b"\r\n" for part in parts)
    body += b"--" + boundary.encode() + b"--\r\n"
    return Request("POST", path, body, [("content-type", f"multipart/form-data; boundary={boundary}".encode())])


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    named = f'; filename="{filename}"' if filename is not None else ""
    return f'content-disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content


def upload(content: bytes, filename: str = "train.jsonl", *others: bytes) -> Request:
    return form("/v1/files", part("purpose", b"fine-tune"), part("file", content, filename), *others)


JSON = [("content-type", b"application/json")]
