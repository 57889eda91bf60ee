"""The dashboard of tenants: a row each, whose traffic has changed, and the chosen ones alone."""

from __future__ import annotations

from typing import Any

from tools.monitoring.grafana import Dashboard, Link, Panel, Query, Section, Variable
from tools.monitoring.rule import SERVICE, TENANTS, TRAINING
from tools.monitoring.service_dashboard import JOB, JOBS, RATE, TENANT_LINK, TO_TENANT, rate

TENANT = f'{JOB}, tenant=~"$tenant"'
SIGNAL = f'{TENANT}, signal=~"$signal"'
TENANT_NAMES = Variable("tenant", f"label_values(rootstock_tenant_requests_total{{{JOB}}}, tenant)")
SIGNALS = Variable("signal", f"label_values(rootstock_drift_state{{{JOB}}}, signal)")
STATES = {"insufficient_data": 0, "ok": 1, "drift": 2, "stale_reference": 3}
IN_DRIFT = 'rootstock_drift_state{{{labels}, state="drift"}} == 1'


def per_tenant(metric: str, window: str = RATE, labels: str = TENANT) -> str:
    return f"sum by (tenant) (rate({metric}{{{labels}}}{window}))"


def mean(total: str, number: str, window: str = RATE) -> str:
    return f"{per_tenant(total, window)} / {per_tenant(number, window)}"


_SINCE = "[$__range]"
_REQUESTS, _ERRORS = "rootstock_tenant_requests_total", "rootstock_tenant_errors_total"
_FIRST_TOKEN = ("rootstock_tenant_first_token_seconds_total", "rootstock_tenant_first_tokens_total")
_DRIFT_STATE = " or ".join(
    f'({code} * (rootstock_drift_state{{{SIGNAL}, state="{state}"}} == 1))' for state, code in STATES.items()
)

_COLUMNS: dict[str, dict[str, Any]] = {
    "tenant": {
        "displayName": "Tenant",
        "links": [Link("This tenant alone", f"{TO_TENANT}${{__value.raw}}").document()],
    },
    "Requests/s": {"unit": "reqps"},
    "Failed": {"unit": "percentunit"},
    "First token": {"unit": "s"},
    "Tokens/s": {"unit": "short"},
    "Worst drift": {"unit": "none"},
    "Signals in drift": {"unit": "short"},
    "Accuracy": {"unit": "percentunit"},
}

_ALL = Section(
    "All tenants (click one to see it alone)",
    [
        Panel(
            "Tenants in the time shown",
            "A row each. Worst drift: statistic ÷ threshold, above 1 is an alarm; empty is unknown, not well.",
            "none",
            [
                Query(f"sort_desc({per_tenant(_REQUESTS, _SINCE)})", "Requests/s"),
                Query(mean(_ERRORS, _REQUESTS, _SINCE), "Failed"),
                Query(mean(*_FIRST_TOKEN, _SINCE), "First token"),
                Query(per_tenant("rootstock_tenant_tokens_total", _SINCE), "Tokens/s"),
                Query(f"max by (tenant) (rootstock_drift_statistic_ratio{{{TENANT}}})", "Worst drift"),
                Query(f"count by (tenant) ({IN_DRIFT.format(labels=TENANT)})", "Signals in drift"),
                Query(f"max by (tenant) (rootstock_tenant_accuracy{{{TENANT}}})", "Accuracy"),
            ],
            kind="table",
            width=24,
            height=10,
            columns=_COLUMNS,
            key="tenant",
        ),
    ],
)

_DRIFT = Section(
    "Whose traffic has changed",
    [
        Panel(
            "States",
            "By tenant and signal. Two signals red together, or one far over its threshold, is a real change.",
            "none",
            [Query(f"max by (tenant, signal) ({_DRIFT_STATE})", "{{tenant}} {{signal}}")],
            kind="state-timeline",
            width=12,
            height=10,
            links=[TENANT_LINK],
        ),
        Panel(
            "Statistic ÷ threshold",
            "Above 1 is an alarm; how far above, and how steadily, says how sure it is.",
            "none",
            [Query(f"max by (tenant, signal) (rootstock_drift_statistic_ratio{{{SIGNAL}}})", "{{tenant}} {{signal}}")],
            width=12,
            bad_from=1,
            links=[TENANT_LINK],
        ),
        Panel(
            "Alarms, and how many by chance",
            "In a day, over all tenants. Far more than by chance: a common cause, or wrong monitors.",
            "short",
            [
                Query(f"sum by (signal) (increase(rootstock_drift_alarms_total{{{JOB}}}[1d]))", "{{signal}}"),
                Query(f"sum(increase(rootstock_drift_expected_false_alarms_total{{{JOB}}}[1d]))", "by chance"),
            ],
            width=6,
        ),
        Panel(
            "Prompts chosen for measuring",
            "duplicate and capped are left out on purpose. dropped, failed: drift sees less than it should.",
            "cps",
            [Query(rate("rootstock_drift_probes_total", by="outcome"), "{{outcome}}")],
            width=6,
            stacked=True,
        ),
        Panel(
            "What measuring costs",
            "Share of the time that the engine spends on prompts of drift beside requests; idle time is free.",
            "percentunit",
            [Query(rate("rootstock_drift_probe_seconds_total", f'{JOB}, beside="requests"'), "measuring")],
            width=6,
            bad_from=0.01,
        ),
        Panel(
            "What broke in the watch",
            "Its own failures, told in the log, and its events that the webhook did not take.",
            "cps",
            [
                Query(rate("rootstock_drift_failures_total"), "failures"),
                Query(rate("rootstock_drift_webhooks_total", by="outcome"), "webhook {{outcome}}"),
            ],
            width=6,
        ),
    ],
)

_CHOSEN = Section(
    "The chosen tenants: $tenant",
    [
        Panel("Requests", "Answered, refused and failed.", "reqps", [Query(per_tenant(_REQUESTS), "{{tenant}}")]),
        Panel("Failed", "Server errors.", "reqps", [Query(per_tenant(_ERRORS), "{{tenant}}")]),
        Panel(
            "Latency",
            "Means: a tenant has no histogram of its own.",
            "s",
            [
                Query(mean(*_FIRST_TOKEN), "{{tenant}} first token"),
                Query(mean("rootstock_tenant_request_seconds_total", _REQUESTS), "{{tenant}} whole request"),
            ],
        ),
        Panel(
            "Tokens",
            "By type.",
            "short",
            [
                Query(
                    f"sum by (tenant, type) (rate(rootstock_tenant_tokens_total{{{TENANT}}}{RATE}))",
                    "{{tenant}} {{type}}",
                )
            ],
        ),
        Panel(
            "Accuracy and feedback",
            "Rolling accuracy by users' labels; called quality, never drift. Absent while unknown.",
            "percentunit",
            [Query(f"max by (tenant) (rootstock_tenant_accuracy{{{TENANT}}})", "{{tenant}}")],
        ),
        Panel(
            "Feedback",
            "Ratings, labels and corrections in an hour.",
            "short",
            [
                Query(
                    f"sum by (tenant) (increase(rootstock_tenant_feedback_total{{{TENANT}}}[1h]))",
                    "{{tenant}}",
                )
            ],
        ),
        Panel(
            "Prompts seen by drift",
            "Too few for the signal's window: insufficient data.",
            "short",
            [Query(f"max by (tenant) (rootstock_drift_samples{{{TENANT}}})", "{{tenant}}")],
            width=12,
        ),
        Panel(
            "Requests without a label of their own",
            "Tenants beyond the cap are counted as _other.",
            "cps",
            [Query(rate("rootstock_tenant_label_overflow_total"), "_other")],
            width=12,
        ),
    ],
)

TENANTS_DASHBOARD = Dashboard(
    uid=TENANTS,
    title="Rootstock: tenants and drift",
    description="Whose traffic has changed, and what each tenant gets.",
    variables=[JOBS, TENANT_NAMES, SIGNALS],
    sections=[_ALL, _DRIFT, _CHOSEN],
    others={SERVICE: "Service", TRAINING: "Training"},
)
