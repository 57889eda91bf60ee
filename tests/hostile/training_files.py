"""Hostile training files: uploaded, then reported on. The answer is a report that names the line, never a failure."""

from __future__ import annotations

import json

GOOD = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}).encode()


def _line(**fields: object) -> bytes:
    return json.dumps({"prompt": "a", "completion": "b", **fields}).encode()


FILES: dict[str, tuple[bytes, str]] = {
    "a line of 20 MB": (GOOD + b"\n" + b"a" * 20_000_000 + b"\n" + GOOD, "line 2"),
    "a broken last line": (GOOD + b"\n" + GOOD[:-7], "line 2"),
    "no line": (b"", "0 examples"),
    "blank lines only": (b"\n" * 100_000, "0 examples"),
    "a BOM": (b"\xef\xbb\xbf" + GOOD, "too_few_examples"),
    "a key twice": (b'{"prompt":"a","prompt":"c","completion":"b"}', "twice"),
    "10 000 levels": (b"[" * 10_000 + b"]" * 10_000, "line 1"),
    "half a surrogate pair": (b'{"prompt":"\\ud800","completion":"b"}', "surrogate"),
    "half a surrogate pair in metadata": (b'{"prompt":"a","completion":"b","metadata":{"a":"\\ud800"}}', "surrogate"),
    "half a surrogate pair in a key": (b'{"prompt":"a","completion":"b","\\ud800":1}', "surrogate"),
    "half a surrogate pair in an assertion": (
        b'{"prompt":"a","completion":"b","assertions":[{"\\ud800":1}]}',
        "line 1",
    ),
    "half a surrogate pair to contain": (_line(assertions=[{"contains": "\ud800"}]), "surrogate"),
    "NUL": (b'{"prompt":"a\\u0000","completion":"b"}', "NUL"),
    "NUL in metadata": (b'{"prompt":"a","completion":"b","metadata":{"a\\u0000":"b"}}', "NUL"),
    "no UTF-8": (b'{"prompt":"\xff","completion":"b"}', "line 1"),
    "UTF-16": ('{"prompt":"a","completion":"b"}'.encode("utf-16"), "line 1"),
    "a zip": (b"PK\x03\x04" + bytes(100), "line 1"),
    "a pickle": (b"\x80\x04\x95cposix\nsystem\n.", "line 1"),
    "numbers of 10 000 digits": (b'{"prompt":' + b"9" * 10_000 + b"}", "line 1"),
    "NaN": (b'{"prompt":NaN,"completion":"b"}', "line 1"),
    "a weight of 10^400": (b'{"messages":[{"role":"assistant","content":"b","weight":1e400}]}', "line 1"),
    "a schema that compares all pairs": (
        _line(assertions=[{"json_schema": {"required": [*range(9000), {}]}}]),
        "line 1",
    ),
    "a schema from elsewhere": (_line(assertions=[{"json_schema": {"$ref": "http://10.0.0.1/"}}]), "line 1"),
    "an answer's URL": (_line(file_url="http://10.0.0.1/"), "file_url"),
    "a role of one's own": (b'{"messages":[{"role":"<|im_start|>","content":"b"}]}', "role"),
}
