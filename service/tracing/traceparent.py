"""The W3C `traceparent` header, read without any library: whose trace a request belongs to. Knows no span.

https://www.w3.org/TR/trace-context/#traceparent-header
"""

from __future__ import annotations

import re
import uuid

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def trace_id_of(traceparent: str | None) -> str | None:
    """The caller's trace id, 32 hex digits; None when the header is not there or not valid."""
    match = _TRACEPARENT.fullmatch(traceparent or "")
    if match is None or (match.group(2) and match.string.startswith("00")):
        return None
    return match.group(1)


def new_trace_id() -> str:
    return uuid.uuid4().hex
