"""Hostile heads: what comes before a body."""

from __future__ import annotations

import gzip

from tests.hostile.cases import JSON, Case, Request, chat, get

_CHAT = chat()
_BOMB = gzip.compress(b" " * 50_000_000)
_HEAD = b"GET /v1/models HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
_POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"


def _headers(*headers: tuple[str, bytes]) -> Request:
    return Request(body=_CHAT.body, headers=[*JSON, *headers])


CASES = [
    Case("a header of 1 MB", get("/v1/models", headers=[("x-long", b"a" * 1_000_000)]), 431),
    Case("a header of 70 kB", get("/v1/models", headers=[("x-long", b"a" * 70_000)]), 431),
    Case("20 000 headers", get("/v1/models", headers=[(f"x-{n}", b"a") for n in range(20_000)]), 431),
    Case("a header that never ends", Request(raw=_HEAD + b"x: " + b"a" * 400_000), 431),
    Case("a URL of 1 MB", get("/v1/models?after=" + "a" * 1_000_000), 431),
    Case(
        "a key of 60 kB",
        get("/v1/models", authorized=False, headers=[("authorization", b"Bearer " + b"a" * 60_000)]),
        401,
    ),
    Case("NUL in a header", Request(raw=_HEAD + b"x-nul: a\0b\r\n\r\n"), 400),
    Case("a header folded over two lines", Request(raw=_HEAD + b"x-a: b\r\n c\r\n\r\n"), 400),
    Case("a line feed in a header's name", Request(raw=_HEAD + b"x\n-a: b\r\n\r\n"), 400),
    Case("a header without a colon", Request(raw=_HEAD + b"nonsense\r\n\r\n"), 400),
    Case(
        "Latin-1 in the key",
        get("/v1/models", authorized=False, headers=[("authorization", b"Bearer \xff\xfe\xe9")]),
        401,
    ),
    Case("UTF-8 in a header", get("/v1/models", headers=[("x-name", "naïve 🌱".encode())]), 200),
    Case("an empty key", get("/v1/models", authorized=False, headers=[("authorization", b"Bearer ")]), 401),
    Case("another scheme", get("/v1/models", authorized=False, headers=[("authorization", b"Basic {key}")]), 401),
    Case("no key", get("/v1/models", authorized=False), 401),
    Case("a tenant's key at the admin's door", get("/v1/admin/tenants"), 403),
    Case("the admin's key at a tenant's door", get("/v1/models", admin=True), 403),
    Case("two content lengths", Request(raw=_POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}"), 400),
    Case("a negative content length", Request(raw=_POST + b"content-length: -1\r\n\r\n{}"), 400),
    Case("a content length of words", Request(raw=_POST + b"content-length: two\r\n\r\n{}"), 400),
    Case("a content length of 10^18", Request(raw=_POST + b"content-length: 1000000000000000000\r\n\r\n{}"), 413),
    Case("a content length of 100 digits", Request(raw=_POST + b"content-length: " + b"9" * 100 + b"\r\n\r\n{}"), 400),
    Case(
        "length and chunks at once",
        Request(raw=_POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
        400,
    ),
    Case("a gzip bomb", Request(body=_BOMB, headers=[*JSON, ("content-encoding", b"gzip")]), 415),
    Case("a body said to be brotli", _headers(("content-encoding", b"br")), 415),
    Case("gzip that is not", _headers(("content-encoding", b"GZIP")), 415),
    Case("a content type of nonsense", Request(body=_CHAT.body, headers=[("content-type", b"\xff/;;=")]), 400),
    Case("no content type", Request(body=_CHAT.body), 400),
    Case(
        "a form where JSON belongs",
        Request(body=b"model=tiny", headers=[("content-type", b"application/x-www-form-urlencoded")]),
        400,
    ),
    Case("a request id with a line break", _headers(("x-request-id", b"a%0d%0aset-cookie: b")), 200),
    Case("a request id of 10 kB", _headers(("x-request-id", b"a" * 10_000)), 200),
    Case("a trace of nonsense", _headers(("traceparent", b"00-" + b"z" * 32 + b"-" + b"0" * 16 + b"-ff")), 200),
    Case("a foreign host", Request("GET", "/v1/models", headers=[("x-forwarded-host", b"evil.example")]), 200),
    Case(
        "an upgrade to a websocket",
        Request("GET", "/v1/models", headers=[("upgrade", b"websocket"), ("connection", b"upgrade")]),
        200,
    ),
    Case("TRACE", Request("TRACE", "/v1/models"), 405),
    Case("a method of its own", Request("PROPFIND", "/v1/models"), 405),
    Case("no method at all", Request(raw=b"NONSENSE\r\n\r\n"), 400),
    Case("DELETE on all models", Request("DELETE", "/v1/models"), 405),
    Case("HTTP/9.9", Request(raw=b"GET /v1/models HTTP/9.9\r\nhost: a\r\n\r\n"), 400),
    Case("TLS on a plain port", Request(raw=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"), 400),
]
