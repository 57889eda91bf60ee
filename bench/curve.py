"""The curve load -> (latency, training kept), as one table out of the entries of a section. Knows no measurement."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_POINT = re.compile(r"^(?P<what>.+), (?P<load>\d+) % load, (?P<arm>[^,]+)$")
COLUMNS = ("p99 ÷ no training", "training kept")
"""What of a point stands in the table, in this order."""


def name(what: str, load: int, arm: str) -> str:
    """Of the entry that holds one value of one point."""
    return f"{what}, {load} % load, {arm}"


def point(entry: Mapping[str, Any]) -> tuple[str, int, str] | None:
    """What, load and arm of a ratio that belongs to the curve."""
    found = _POINT.match(entry["name"]) if entry["ratio"] else None
    return (found["what"], int(found["load"]), found["arm"]) if found else None


def table(entries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]] | None:
    """Head and rows: a line per load, for each arm its latency and what training kept. None without a curve."""
    points = {found: entry["value"] for entry in entries if (found := point(entry)) is not None}
    if not points:
        return None
    arms = list(dict.fromkeys(arm for _, load, arm in points if load))
    loads = sorted({load for _, load, _ in points})
    head = ["load", *(f"{arm}: {what}" for arm in arms for what in COLUMNS)]
    rows = [[f"{load} %", *(_cell(points, what, load, arm) for arm in arms for what in COLUMNS)] for load in loads]
    return head, rows


def _cell(points: Mapping[tuple[str, int, str], float], what: str, load: int, arm: str) -> str:
    value = points.get((what, load, arm))
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"
