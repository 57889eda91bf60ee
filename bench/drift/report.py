"""A run's results as Markdown, and in docs/benchmarks.md between two marks. Reads what a file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- drift: written by python -m bench.drift --write-docs -->", "<!-- end of drift -->"
Row = Mapping[str, Any]


def markdown(results: Row) -> str:
    plan, machine = results["plan"], results["machine"]
    default = f"{plan['default_promise']:.0f}"
    parts = [
        f"Taken {results['date']} on {machine['cpu']}, one core, {results['seconds']:.0f} seconds"
        f"{'; quick sizes, not to be quoted' if results['quick'] else ''}.",
        _section(
            "Run length without drift",
            f"Mean over all runs ÷ promise, with its standard error; 10 to 90 % of the references' own means of"
            f" {plan['num_streams']} runs.",
            ("source", "prompts", "promise", "mean ÷ promise", "10 to 90 % of references", "runs"),
            [
                (r["source"], r["prompts"], f"{r['promise']:.0f}", *_run_length(r), f"{r['references']} x {_per(r)}")
                for r in results["control"]
            ],
        ),
        _section(
            "Prompts until a shift is found",
            f"Promise {default}, {plan['size']} prompts, {plan['quiet']} without drift first; median (10 to 90 %), and"
            f" the share found within {plan['delay']}. At 0 % every alarm is a false one.",
            ("shift", *(f"{share:.0%} shifted" for share in plan["shares"])),
            _delays(results["delays"], plan["shares"]),
        ),
        _section(
            "Conversations",
            f"Run length without drift ÷ promise ({plan['promise']:.0f}), user turns of dialogues.",
            ("observed", "mean ÷ promise", "10 to 90 % of references"),
            [(r["observed"], *_run_length(r)) for r in results["conversations"]],
        ),
        _section(
            "Usual tests on disjoint windows of 64",
            "The same projected vectors and references. *Nominal* is the run length that the level of p would give were"
            " p exact; *actual* the measured one. Delays are medians in prompts.",
            ("shift", "test", "p below", "nominal", "actual", *_shifted(plan)),
            [
                (r["shift"], r["test"], r["level"], f"{r['nominal']:,.0f}", f"{r['run_length']:,.0f}", *_medians(r))
                for r in results["peers"]
            ],
        ),
        _section(
            "Cost",
            f"One core; calibration for a promise of {default}, once for an adapter.",
            ("what", "an observation", "calibration", "kept state"),
            [
                (
                    r["what"],
                    f"{r['microseconds']:.0f} µs",
                    f"{r['calibration_seconds']:.1f} s",
                    f"{r['state_bytes'] / 1024:.1f} KiB",
                )
                for r in results["cost"]
            ],
        ),
    ]
    return "\n\n".join(parts)


def write_document(results: Row, path: Path = DOCUMENT) -> None:
    """Replace what stands between the marks."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path.name} lacks the marks between which the drift results are written")
    path.write_text(f"{before}{begin}\n{markdown(results)}\n{end}{after}")


def _run_length(row: Row) -> tuple[str, str]:
    return f"**{row['ratio']:.2f}** ± {row['error']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"


def _per(row: Row) -> int:
    return int(row["runs"]) // int(row["references"])


def _shifted(plan: Row) -> list[str]:
    return [f"{share:.0%}" for share in plan["shares"] if share]


def _medians(row: Row) -> list[str]:
    return ["not found" if delay is None else str(delay) for delay in row["delays"].values()]


def _delays(rows: Sequence[Row], shares: Sequence[float]) -> list[tuple[str, ...]]:
    by_shift: dict[str, dict[float, Row]] = {}
    for row in rows:
        by_shift.setdefault(row["shift"], {})[row["share"]] = row
    return [(name, *(_delay(found[share]) for share in shares)) for name, found in by_shift.items()]


def _delay(row: Row) -> str:
    if row["share"] == 0:
        return f"{row['detected']:.0%}"
    low, median, high = ("-" if row[name] is None else str(row[name]) for name in ("low", "median", "high"))
    return f"**{median}** ({low} to {high}), {row['detected']:.0%}"


def _section(title: str, text: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"### {title}", "", text, "", _row(head), _row(["---"] * len(head)), *map(_row, rows)]
    return "\n".join(lines)


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
