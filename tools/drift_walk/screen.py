"""What the walk prints: states, metrics, alerts, panels, proposals. Knows how things look, not how they come about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from tools.demo.screen import console
from tools.monitoring.grafana import Panel

MAX_VALUES = 8
"""Of a panel's lines; the highest."""


def states(tenants: Mapping[str, Mapping[str, Any]]) -> None:
    """`GET /v1/drift/{model}` of each tenant, by its name."""
    table = Table("signal", title="GET /v1/drift: state, statistic ÷ threshold, samples")
    signals = {name: {one["signal"]: one for one in view["signals"]} for name, view in tenants.items()}
    for name in tenants:
        table.add_column(name)
    for signal in next(iter(signals.values())):
        table.add_row(signal, *(_state(of[signal]) for of in signals.values()))
    console.print(table)


def alerts(listed: Sequence[Mapping[str, Any]], held: Mapping[str, str]) -> None:
    """Prometheus' pending and firing ones; `held` says how long each alert has to be true before it fires."""
    if not listed:
        console.print("  no alert is pending or firing")
    for alert in sorted(listed, key=lambda alert: (alert["state"], alert["labels"]["alertname"])):
        labels = alert["labels"]
        where = " ".join(labels[name] for name in ("tenant", "signal") if name in labels)
        line = f"{alert['state']:<8} {labels['severity']:<7} {labels['alertname']} {where}"
        wait = f" (fires when it holds {held[labels['alertname']]})" if alert["state"] == "pending" else ""
        console.print(f"  {line}{wait}: {alert['annotations']['summary']}", markup=False, soft_wrap=True)


def panel(shown: Panel, values: Sequence[tuple[str, float]]) -> None:
    ordered = sorted(values, key=lambda one: -one[1])[:MAX_VALUES]
    text = ", ".join(f"{name} = {value:.4g}" for name, value in ordered) or "nothing"
    more = f", and {len(values) - MAX_VALUES} more" if len(values) > MAX_VALUES else ""
    console.print(f"  [{shown.title}] {text}{more}", markup=False, soft_wrap=True)


def lines(exposition: str, prefix: str) -> None:
    """Those of a scrape that begin so, without what is off."""
    for line in exposition.splitlines():
        if line.startswith(prefix) and not line.endswith(" 0.0") and "_created" not in line:
            console.print(f"  {line}", style="dim", markup=False, soft_wrap=True)


def events(bodies: Iterable[Mapping[str, Any]]) -> None:
    for event in bodies:
        change = f"{event['previous']} -> {event['state']}"
        numbers = f"{event['statistic']} of {event['threshold']} after {event['samples']}"
        console.print(f"  {event['model']} {event['signal']}: {change} ({numbers})", markup=False, soft_wrap=True)


def proposal(body: Mapping[str, Any]) -> None:
    console.print(
        f"  {body['status']}, by {body['trigger']}, for {body['alias'] or body['model']}: {body['reason']}; "
        f"counts {body['counts']}, missing: {body['missing']}",
        markup=False,
        soft_wrap=True,
    )


def _state(signal: Mapping[str, Any]) -> str:
    ratio = "unknown" if signal["ratio"] is None else f"{signal['ratio']:.2f}"
    return f"{signal['state']}, {ratio}, {signal['samples']}"
