"""A soak's outcome for people. Knows no service."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.soak.run import Outcome


def show(outcome: Outcome, console: Console) -> None:
    summary = outcome.summary()
    console.print(_operations(summary))
    console.print(_facts(outcome, summary))
    for text in outcome.ledger.violations:
        console.print(f"[red]violation[/red] {text}", highlight=False, soft_wrap=True)
    number = outcome.ledger.num_violations
    console.print(
        f"[red]{number} violations[/red]" if number else "[green]nothing lost, wrong, leaked or growing[/green]"
    )


def _operations(summary: dict[str, Any]) -> Table:
    table = Table(title="Answers, and milliseconds until they were whole")
    for heading in ("operation", "answers", "p50", "p99", "first p50", "first p99"):
        table.add_column(heading, justify="left" if heading in ("operation", "answers") else "right")
    for operation, kinds in summary["answers"].items():
        whole = summary["whole_seconds"].get(operation, {})
        first = summary["first_token_seconds"].get(operation, {})
        shown = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
        times = [_ms(part, at) for part in (whole, first) for at in ("p50", "p99")]
        table.add_row(operation, shown, *times)
    return table


def _facts(outcome: Outcome, summary: dict[str, Any]) -> Table:
    table = Table(title="What was looked at")
    table.add_column("what")
    table.add_column("result")
    table.add_row("answers", str(summary["requests"]))
    table.add_row("kills", ", ".join(f"{number} x {what}" for what, number in outcome.kills.items()))
    for check, number in outcome.ledger.checks.items():
        table.add_row(check, f"{number} times")
    kinds = Counter(outcome.accounts)
    table.add_row(
        "accounts that equal the answers' usage", f"{kinds['exact']} exactly, {kinds['bounded']} within bounds"
    )
    for role, slope in summary["memory_mib_per_minute"].items():
        bounds = f"({slope['low']:+.2f} to {slope['high']:+.2f}) over {slope['minutes']:.1f} minutes"
        table.add_row(f"memory of the {role}", f"{slope['per_minute']:+.2f} MiB a minute {bounds}")
    if outcome.flood is not None:
        flood = outcome.flood
        refused, accepted = flood.refusal_seconds, flood.accepted_seconds
        table.add_row("flood", f"{flood.num_accepted} of {flood.num_requests} accepted, p99 {accepted['p99']:.2f} s")
        table.add_row("refusals", f"p50 {refused['p50']:.3f} s, p99 {refused['p99']:.3f} s")
        lone = f"{flood.lone_ratio:.2f} of before; the first done after {flood.seconds_until_lone:.3f} s"
        table.add_row("a lone request right after", lone)
    return table


def _ms(times: dict[str, float], at: str) -> str:
    return f"{times[at] * 1000:.0f}" if times else ""
