"""Hostile bodies: broken JSON, forms and chunks."""

from __future__ import annotations

from tests.hostile.cases import BOUNDARY, JSON, Case, Request, chat, chat_text, form, part, post, upload

_CHUNKED = [*JSON, ("transfer-encoding", b"chunked")]
_NO_FILE = "in a part named 'file'"
_RUNAWAY = b"10000\r\n" + b" " * 65536 + b"\r\n"


def _body(body: bytes) -> Request:
    return Request(body=body, headers=JSON)


def _form(body: bytes, content_type: bytes) -> Request:
    return Request("POST", "/v1/files", body, [("content-type", content_type)])


CASES = [
    Case("nothing", _body(b"")),
    Case("no JSON", _body(b"\xff\xfe\x00")),
    Case("half an object", _body(b'{"model": "tiny", "messages": [')),
    Case("a list", _body(b"[]")),
    Case("a string", _body(b'"tiny"')),
    Case("null", _body(b"null")),
    Case("10 000 levels of lists", _body(b"[" * 10_000 + b"]" * 10_000), says="nested"),
    Case("10 000 levels of objects", _body(b'{"a":' * 10_000 + b"1" + b"}" * 10_000), says="nested"),
    Case("10 000 levels in a field", chat_text('"tools":' + "[" * 10_000 + "]" * 10_000), says="nested"),
    Case("900 levels in a field", chat_text('"metadata":' + '{"a":' * 900 + "1" + "}" * 900), param="metadata.a"),
    Case(
        "900 levels in a schema",
        chat_text('"structured_outputs":{"json":' + '{"a":' * 900 + "1" + "}" * 901),
        param="structured_outputs.json",
    ),
    Case("a key twice", chat_text('"n":1,"n":2'), param="n", says="twice"),
    Case("a key twice, further in", chat_text('"metadata":{"a":"1","a":"2"}'), param="a", says="twice"),
    Case("a body over the limit", _body(b" " * (9 << 20)), 413),
    Case("chunks over the limit", Request(body=_RUNAWAY * 160 + b"0\r\n\r\n", headers=_CHUNKED), 413),
    Case("a chunk of negative size", Request(body=b"-1\r\n{}\r\n0\r\n\r\n", headers=_CHUNKED)),
    Case("a chunk's size of words", Request(body=b"zz\r\n{}\r\n0\r\n\r\n", headers=_CHUNKED)),
    Case("a chunk's size beyond 64 bits", Request(body=b"f" * 20 + b"\r\n{}\r\n0\r\n\r\n", headers=_CHUNKED)),
    Case("an unknown field", chat(drop_tables=True), param="drop_tables"),
    Case("an unknown field with half a surrogate pair", chat_text('"\\ud800":1'), param="\\ud800"),
    Case("no boundary", _form(b"--x--", b"multipart/form-data"), says="oundary"),
    Case("a boundary that never comes", _form(b"nothing of the kind", b"multipart/form-data; boundary=x")),
    Case("a boundary of 10 kB", form("/v1/files", part("file", b"{}", "a"), boundary="b" * 10_000)),
    Case(
        "a form that stops in the middle",
        _form(upload(b"{}").body[:-30], f"multipart/form-data; boundary={BOUNDARY}".encode()),
        param="file",
    ),
    Case("two files", upload(b"{}", "a.jsonl", part("file", b"{}", "b.jsonl"))),
    Case("1000 fields", form("/v1/files", *(part(f"a{n}", b"") for n in range(1000)))),
    Case("a field of 2 MB", form("/v1/files", part("purpose", b"a" * (2 << 20)), part("file", b"{}", "a"))),
    Case(
        "the wrong part's name",
        form("/v1/files", part("purpose", b"fine-tune"), part("fiel", b"{}", "a")),
        param="fiel",
    ),
    Case(
        "a file without a file name",
        form("/v1/files", part("purpose", b"fine-tune"), part("file", b"{}")),
        param="file",
        says=_NO_FILE,
    ),
    Case("no purpose", form("/v1/files", part("file", b"{}", "a")), param="purpose"),
    Case(
        "the purpose of jobs",
        form("/v1/files", part("purpose", b"fine-tune-results"), part("file", b"{}", "a")),
        param="purpose",
    ),
    Case("a purpose that is a file", form("/v1/files", part("purpose", b"fine-tune", "p"), part("file", b"{}", "a"))),
    Case(
        "an expiry that overflows",
        upload(
            b"{}", "a", part("expires_after[anchor]", b"created_at"), part("expires_after[seconds]", b"00000036009999")
        ),
        param="expires_after[seconds]",
    ),
    Case("a form where JSON belongs", form("/v1/chat/completions", part("model", b"tiny"))),
    Case("JSON where a form belongs", post("/v1/files", {"purpose": "fine-tune"}), param="file"),
]
