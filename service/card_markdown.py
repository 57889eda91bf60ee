"""A card as Markdown. Knows JSON values and how they read best, not what they mean.

Texts in a card may be a tenant's (examples, file names): they are escaped, so that they can neither break a table nor
bring links or HTML into the page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

MAX_ROWS = 20
MAX_CELL = 160
MAX_DEPTH = 3

QUESTIONS = {
    "data": "What data does it rest on?",
    "measurement": "How was it measured?",
    "history": "When was it updated, and from what?",
    "verification": "How can an answer be verified?",
}
_LOW_HIGH = (("low", "high"), ("lower", "upper"))
_CENTRES = ("value", "mean", "estimate", "point", "difference")


def card_markdown(card: Mapping[str, Any]) -> str:
    """The four questions and what the card answers to each."""
    lines = [f"# {_code(card['model'])}", "", f"Digest {_code(card['digest'])}", ""]
    for section, question in QUESTIONS.items():
        lines += [f"## {question}", ""]
        lines += _verification(card[section]) if section == "verification" else _section(card[section])
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _verification(values: Mapping[str, Any]) -> list[str]:
    """Commands stand in blocks, to be copied as they are."""
    lines = [f"{number}. {_escaped(step)}" for number, step in enumerate(values["steps"], 1)]
    for command in (values["curl"], values["export"], values["reproduce"]):
        if command:
            lines += ["", "```sh", command, "```"]
    lines += ["", *_section({"files": values["files"]}), "", _escaped(values["merged"])]
    return lines


def _section(values: Mapping[str, Any], level: int = 3) -> list[str]:
    """Plain values as a list, then one heading for each nested one."""
    plain = {name: value for name, value in values.items() if _cell(value) is not None}
    lines = [f"- {_title(name)}: {_named_cell(name, value)}" for name, value in plain.items()]
    for name, value in values.items():
        if name in plain:
            continue
        heading = f"{'#' * min(level, 6)} {_title(name)}"
        lines += ["", heading, "", *_block(value, level)] if level < 3 + MAX_DEPTH else [f"- {_title(name)}: …"]
    return lines


def _block(value: Any, level: int) -> list[str]:
    if isinstance(value, dict):
        nested = {name: row for name, row in value.items() if isinstance(row, dict) and _cell(row) is None}
        if _is_table(list(nested.values())):
            rest = {name: row for name, row in value.items() if name not in nested}
            before = [*_section(rest, level + 1), ""] if rest else []
            return [*before, *_table([{"": name, **row} for name, row in nested.items()])]
        return _section(value, level + 1)
    rows = [row for row in value if isinstance(row, dict)]
    if len(rows) == len(value) and _is_table(rows):
        more = [f"… and {len(rows) - MAX_ROWS} more"] if len(rows) > MAX_ROWS else []
        return [*_table(rows[:MAX_ROWS]), *more]
    return [f"- {_cell(item) or '…'}" for item in value[:MAX_ROWS]]


def _is_table(rows: Sequence[Mapping[str, Any]]) -> bool:
    return bool(rows) and all(_cell(value) is not None for row in rows for value in row.values())


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(_title(name) for name in columns)} |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [_named_cell(name, row[name]) if name in row else "-" for name in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _named_cell(name: str, value: Any) -> str:
    if name.endswith("_at") and isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return _code(value)
    return _cell(value) or "-"


def _cell(value: Any) -> str | None:
    """One line for a plain value, an interval or a list of plain values; None for what needs more room."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int | str):
        return _escaped(str(value))
    if isinstance(value, dict):
        return _interval(value) if value else "-"
    cells = [_cell(item) if not isinstance(item, dict | list) else None for item in value]
    joined = ", ".join(cell for cell in cells if cell is not None)
    return joined or "-" if None not in cells and len(joined) <= MAX_CELL else None


def _interval(value: Mapping[str, Any]) -> str | None:
    """`0.81 [0.72, 0.88]` for what looks like an estimate with bounds."""
    centre = next((value[name] for name in _CENTRES if _is_number(value.get(name))), None)
    bounds = next(
        (
            (value[low], value[high])
            for low, high in _LOW_HIGH
            if _is_number(value.get(low)) and _is_number(value.get(high))
        ),
        None,
    )
    for name in ("interval", "ci", "confidence_interval"):
        pair = value.get(name)
        if bounds is None and isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)):
            bounds = (pair[0], pair[1])
    if centre is None or bounds is None or len(value) > 6:
        return None
    return f"{centre:.4g} \\[{bounds[0]:.4g}, {bounds[1]:.4g}\\]"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _title(name: str) -> str:
    return _escaped(name.replace("_", " "))


def _escaped(text: str) -> str:
    """One line that Markdown and HTML take as it is."""
    line = " ".join(text.split())
    line = line if len(line) <= MAX_CELL * 3 else f"{line[: MAX_CELL * 3]}…"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!])", r"\\\1", line)


def _code(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "¦") + "`"
