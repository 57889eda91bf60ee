"""What users were promised, and the alerts on how fast the room for failures is used up.

A window pair per speed (Google, The Site Reliability Workbook, chapter 5, "multiwindow, multi-burn-rate alerts"): the
long window proves that it matters, the short one that it still goes on. At 14.4 times the allowed rate a thirty-day
budget is gone in two days; at 1 it is just used up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tools.monitoring.rule import Alert, Group, Recording

BY = "namespace, job"
"""One service: all pods that a PodMonitor finds. The namespace is there for who routes alerts by it."""

USERS_ONLY = 'operation!="internal"'
"""Not the service's own sequences: self-checks, evaluations, probes."""

LEAST_EVENTS = 5
"""Fewer bad events in the long window are no trend, whatever share of a quiet night's traffic they are."""


@dataclass(frozen=True)
class Objective:
    """`bad` and `total` are rates per window, with `{window}` where it goes."""

    slo: str
    alert: str
    target: float
    bad: str
    total: str
    what_fails: str
    """Of users' experience, as a sentence's beginning."""
    share_of: str

    @property
    def budget(self) -> str:
        return f"{1 - self.target:.6g}"


def _slower_than(metric: str, seconds: str) -> tuple[str, str]:
    """Observations above a bucket's boundary, and all."""
    total = f"sum by ({BY}) (rate({metric}_count{{{{{USERS_ONLY}}}}}[{{window}}]))"
    fast = f'sum by ({BY}) (rate({metric}_bucket{{{{{USERS_ONLY},le="{seconds}"}}}}[{{window}}]))'
    return f"{total}\n- {fast}", total


FIRST_TOKEN_SECONDS, INTER_TOKEN_SECONDS = "2.5", "0.2"
"""Boundaries of the histograms' buckets, so that the share is exact."""

_FIRST_TOKEN = _slower_than("rootstock_time_to_first_token_seconds", FIRST_TOKEN_SECONDS)
_INTER_TOKEN = _slower_than("rootstock_time_per_output_token_seconds", INTER_TOKEN_SECONDS)

OBJECTIVES = (
    Objective(
        slo="availability",
        alert="RootstockRequestsFail",
        target=0.999,
        bad=f'sum by ({BY}) (rate(rootstock_requests_total{{{{outcome="error"}}}}[{{window}}]))',
        total=f'sum by ({BY}) (rate(rootstock_requests_total{{{{outcome!="rejected"}}}}[{{window}}]))',
        what_fails="Requests end with server errors",
        share_of="requests failed",
    ),
    Objective(
        slo="first_token",
        alert="RootstockFirstTokensLate",
        target=0.99,
        bad=_FIRST_TOKEN[0],
        total=_FIRST_TOKEN[1],
        what_fails=f"Users wait longer than {FIRST_TOKEN_SECONDS} s for the first token",
        share_of=f"answers took longer than {FIRST_TOKEN_SECONDS} s to begin",
    ),
    Objective(
        slo="inter_token",
        alert="RootstockTokensSlow",
        target=0.99,
        bad=_INTER_TOKEN[0],
        total=_INTER_TOKEN[1],
        what_fails=f"Answers come haltingly: more than {INTER_TOKEN_SECONDS} s between two tokens",
        share_of=f"tokens came more than {INTER_TOKEN_SECONDS} s after the one before",
    ),
)


@dataclass(frozen=True)
class Burn:
    """Times the allowed rate, over both windows."""

    speed: str
    long: str
    short: str
    severity: str
    for_: str


BURNS = (
    Burn("14.4", "1h", "5m", "page", "2m"),
    Burn("6", "6h", "30m", "page", "5m"),
    Burn("3", "1d", "2h", "ticket", "15m"),
    Burn("1", "3d", "6h", "ticket", "1h"),
)
SLOW_WINDOWS = ("1d", "3d")
"""Read days of samples at each evaluation, so seldom."""

WINDOWS = sorted({window for burn in BURNS for window in (burn.long, burn.short)})


def objective_groups() -> Iterator[Group]:
    yield Group("rootstock-objectives", [_budget(objective) for objective in OBJECTIVES])
    quick = [window for window in WINDOWS if window not in SLOW_WINDOWS]
    yield Group("rootstock-burn", [rule for window in quick for rule in _recordings(window)])
    slow = [rule for window in SLOW_WINDOWS for rule in _recordings(window)]
    yield Group("rootstock-burn-slow", slow, interval="2m")
    yield Group("rootstock-objective-alerts", [_alert(o, burn) for o in OBJECTIVES for burn in BURNS])


def _budget(objective: Objective) -> Recording:
    """The one number to change when something else was promised."""
    return Recording("rootstock:slo_budget:ratio", f"vector({objective.budget})", {"slo": objective.slo})


def _recordings(window: str) -> Iterator[Recording]:
    for objective in OBJECTIVES:
        bad, total = (text.format(window=window) for text in (objective.bad, objective.total))
        labels = {"slo": objective.slo}
        ratio = f"(\n{_indented(bad)}\n)\n/\n{total}" if "\n" in bad else f"{bad}\n/\n{total}"
        yield Recording(f"job:rootstock_slo_errors:ratio_rate{window}", ratio, labels)
        if window in {burn.long for burn in BURNS}:
            increase = bad.replace("rate(", "increase(")
            yield Recording(f"job:rootstock_slo_errors:increase{window}", increase, labels)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _alert(objective: Objective, burn: Burn) -> Alert:
    def above(window: str) -> str:
        ratio = f'job:rootstock_slo_errors:ratio_rate{window}{{slo="{objective.slo}"}}'
        return f"{ratio} > on (slo) group_left () ({burn.speed} * rootstock:slo_budget:ratio)"

    enough = f'job:rootstock_slo_errors:increase{burn.long}{{slo="{objective.slo}"}} >= {LEAST_EVENTS}'
    return Alert(
        name=objective.alert,
        severity=burn.severity,
        expr=f"({above(burn.long)})\nand ({above(burn.short)})\nand ({enough})",
        summary=f"{objective.what_fails}, at {burn.speed} times the rate that was allowed",
        description=(
            f"{{{{ $value | humanizePercentage }}}} of {{{{ $labels.job }}}}'s {objective.share_of} in the last"
            f" {burn.long}; {float(objective.budget):.1%} are allowed. It still goes on."
        ),
        for_=burn.for_,
        labels={"burn": burn.speed, "window": burn.long},
    )
