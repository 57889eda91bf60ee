"""Results as tables: on the terminal, and in docs/benchmarks.md between two marks. Reads what a file holds.

The document's numbers are written by this module only, so they are those of the newest file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import curve

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: written by python -m bench --write-docs -->", "<!-- end of results -->"
_COLUMNS = ("what", "median", "lowest to highest", "goal", "best reference")


def show(results: Mapping[str, Any], console: Console) -> None:
    """One table per measurement, ratios last, green or red where there is a goal. References are in the document."""
    for section, entries in results["sections"].items():
        title = f"{section} (quick sizes: not to be quoted)" if results["quick"] else section
        table = Table(title=title, title_justify="left", title_style="bold", expand=False)
        for column in _COLUMNS[:-1]:
            table.add_column(column)
        for entry in entries:
            style = {True: "green", False: "red", None: "bold" if entry["ratio"] else ""}[entry["met"]]
            table.add_row(*_cells(entry)[:-1], style=style)
        console.print(table)


def markdown(results: Mapping[str, Any]) -> str:
    """The generated part of the document."""
    machine = results["machine"]
    packages = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    lines = [
        f"Taken {results['date']} on {machine['device']}, {machine['cores']} cores ({machine['cpu']}), "
        f"{machine['torch_threads']} torch threads; Python {machine['python']}, {packages}.",
    ]
    for section, entries in results["sections"].items():
        lines += ["", f"### {section}"]
        if (found := curve.table(entries)) is not None:
            head, rows = found
            lines += ["", _row(head), _row(["---"] * len(head)), *map(_row, rows)]
        lines += ["", _row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
        for entry in entries:
            if curve.point(entry) is not None and not entry["goal"]:
                continue  # it stands in the table of the curve
            name, *rest = _cells(entry)
            lines.append(_row([f"**{name}**" if entry["ratio"] else name, *rest]))
    return "\n".join(lines)


def write_document(results: Mapping[str, Any], path: Path = DOCUMENT) -> None:
    """Replace what stands between the marks."""
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path.name} lacks the marks between which results are written")
    path.write_text(f"{before}{begin}\n{markdown(results)}\n{end}{after}")


def _cells(entry: Mapping[str, Any]) -> list[str]:
    met = {True: " ✓", False: " ✗", None: ""}[entry["met"]]
    unit = "" if entry["ratio"] else f" {entry['unit']}"
    return [
        entry["name"].replace(".", ", "),
        f"{_number(entry['value'])}{unit}",
        f"{_number(entry['low'])} to {_number(entry['high'])}",
        f"{entry['goal']}{met}" if entry["goal"] else "",
        entry["reference"] or "",
    ]


def _number(value: float) -> str:
    """Three significant digits, whole numbers from a hundred on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
