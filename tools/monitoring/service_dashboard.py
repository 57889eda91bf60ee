"""The dashboard an alert on the service opens: do users suffer, where does the time go, what is full."""

from __future__ import annotations

from tools.monitoring.grafana import Dashboard, Link, Panel, Query, Section, Variable, quantiles
from tools.monitoring.objectives import FIRST_TOKEN_SECONDS, INTER_TOKEN_SECONDS, OBJECTIVES, USERS_ONLY
from tools.monitoring.rule import SERVICE, TENANTS, TRAINING

JOB = 'job=~"$job"'
USERS = f"{JOB}, {USERS_ONLY}"
RATE = "[$__rate_interval]"
TO_TENANT = f"/d/{TENANTS}?${{datasource:queryparam}}&${{job:queryparam}}&${{__url_time_range}}&var-tenant="
TENANT_LINK = Link("This tenant", f"{TO_TENANT}${{__field.labels.tenant}}")
JOBS = Variable("job", "label_values(rootstock_ready, job)")

FIRST_TOKEN, INTER_TOKEN = "rootstock_time_to_first_token_seconds", "rootstock_time_per_output_token_seconds"
DURATION, QUEUE_WAIT = "rootstock_request_duration_seconds", "rootstock_queue_wait_seconds"
TARGETS = {objective.slo: objective.target for objective in OBJECTIVES}


def rate(metric: str, labels: str = JOB, by: str = "") -> str:
    """Per second, summed over pods."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{labels}}}{RATE}))"


def _in_time(metric: str, seconds: str) -> str:
    fast = f'sum(rate({metric}_bucket{{{USERS}, le="{seconds}"}}[$__range]))'
    return f"{fast} / sum(rate({metric}_count{{{USERS}}}[$__range]))"


def _share(title: str, expr: str, slo: str, text: str) -> Panel:
    return Panel(
        title, text, "percentunit", [Query(expr, title)], kind="stat", width=5, height=4, bad_below=TARGETS[slo]
    )


_FAILED = f'sum(rate(rootstock_requests_total{{{JOB}, outcome="error"}}[$__range]))'
_VALID = f'sum(rate(rootstock_requests_total{{{JOB}, outcome!="rejected"}}[$__range]))'

_USERS = Section(
    "Do users suffer?",
    [
        _share(
            "Answered",
            f"1 - {_FAILED} / {_VALID}",
            "availability",
            "Share of requests without a server error in the time shown. Refusals (4xx) do not count.",
        ),
        _share(
            "First token in time",
            _in_time(FIRST_TOKEN, FIRST_TOKEN_SECONDS),
            "first_token",
            f"Share of answers that began within {FIRST_TOKEN_SECONDS} s.",
        ),
        _share(
            "Tokens in time",
            _in_time(INTER_TOKEN, INTER_TOKEN_SECONDS),
            "inter_token",
            f"Share of tokens within {INTER_TOKEN_SECONDS} s of the one before.",
        ),
        Panel(
            "Pods ready",
            "Pods whose /readyz says yes, of those that Prometheus reaches.",
            "short",
            [Query(f"sum(rootstock_ready{{{JOB}}})", "ready"), Query(f"count(rootstock_ready{{{JOB}}})", "reached")],
            kind="stat",
            width=5,
            bad_below=1,
        ),
        Panel(
            "Up for",
            "Since the youngest process started.",
            "s",
            [Query(f"time() - max(rootstock_start_time_seconds{{{JOB}}})", "up for")],
            kind="stat",
            width=4,
        ),
        Panel(
            "How fast the error budget burns",
            "1 uses it up in thirty days; 14.4 over an hour, or 6 over six, wakes somebody.",
            "none",
            [
                Query(
                    f"job:rootstock_slo_errors:ratio_rate{window}{{{JOB}}}"
                    " / on (slo) group_left () rootstock:slo_budget:ratio",
                    f"{{{{slo}}}} {window}",
                )
                for window in ("1h", "6h")
            ],
            width=12,
            bad_from=1,
        ),
        Panel(
            "Firing now",
            "Click a tenant to see it alone. Each alert has a section in docs/operations.md.",
            "none",
            [
                Query(
                    "sum by (alertname, severity, job, tenant, signal, reason)"
                    f' (ALERTS{{alertname=~"Rootstock.*", alertstate="firing", {JOB}}})',
                    "firing",
                )
            ],
            kind="table",
            width=12,
            columns={"tenant": {"links": [Link("This tenant", f"{TO_TENANT}${{__value.raw}}").document()]}},
        ),
    ],
)

_TRAFFIC = Section(
    "Traffic",
    [
        Panel(
            "Requests by outcome",
            "rejected: 4xx. aborted: the client left. error: 5xx, or an error inside a stream.",
            "reqps",
            [Query(rate("rootstock_requests_total", by="outcome"), "{{outcome}}")],
            stacked=True,
        ),
        Panel(
            "Requests by operation",
            "Which part of the API is used.",
            "reqps",
            [Query(rate("rootstock_requests_total", by="operation"), "{{operation}}")],
            stacked=True,
        ),
        Panel(
            "Busiest tenants",
            "Click a line for the tenant alone.",
            "reqps",
            [Query(f"topk(10, {rate('rootstock_tenant_requests_total', by='tenant')})", "{{tenant}}")],
            links=[TENANT_LINK],
        ),
        Panel(
            "Tokens",
            "cached: prompt tokens found in the prefix cache. training: learned from.",
            "short",
            [Query(rate("rootstock_tokens_total", by="type"), "{{type}}")],
        ),
        Panel(
            "Sequences",
            "Many waiting for long: it is overloaded. Look at what is full below.",
            "short",
            [
                Query(f"sum(rootstock_requests_running{{{JOB}}})", "running"),
                Query(f"sum(rootstock_requests_waiting{{{JOB}}})", "waiting"),
            ],
        ),
        Panel(
            "Prompt tokens reused",
            "Share of prompt tokens found in the prefix cache.",
            "percentunit",
            [
                Query(
                    f"{rate('rootstock_prefix_cache_hits_total')} / {rate('rootstock_prefix_cache_queries_total')}",
                    "reused",
                )
            ],
        ),
    ],
)

_LATENCY = Section(
    "Where the time goes (dots are single requests: click for the trace)",
    [
        Panel("First token", "From arrival.", "s", quantiles(FIRST_TOKEN, USERS), bad_from=float(FIRST_TOKEN_SECONDS)),
        Panel(
            "Between tokens", "Of one answer.", "s", quantiles(INTER_TOKEN, USERS), bad_from=float(INTER_TOKEN_SECONDS)
        ),
        Panel("Whole request", "Arrival to last byte, by operation.", "s", quantiles(DURATION, JOB, "operation")),
        Panel(
            "Waiting for a turn",
            "Arrival to first scheduling: the scheduler's queue.",
            "s",
            quantiles(QUEUE_WAIT, USERS),
        ),
        Panel(
            "A request's phases",
            "Means, on top of each other: queue, adapter load, prefill, decode.",
            "s",
            [
                Query(
                    f"{rate('rootstock_request_phase_seconds_sum', USERS, 'phase')}"
                    f" / {rate('rootstock_request_phase_seconds_count', USERS, 'phase')}",
                    "{{phase}}",
                )
            ],
            stacked=True,
        ),
        Panel(
            "First token, all",
            "How the times are distributed: two bands are two kinds of requests.",
            "short",
            [Query(f"sum by (le) (increase({FIRST_TOKEN}_bucket{{{USERS}}}{RATE}))", "{{le}}", exemplars=True)],
            kind="heatmap",
        ),
    ],
)

_FULL = Section(
    "What is full",
    [
        Panel(
            "KV cache",
            "Near 1 with requests waiting: longer queues, preemptions.",
            "percentunit",
            [Query(f"max by (instance) (rootstock_kv_cache_usage_ratio{{{JOB}}})", "{{instance}}")],
            bad_from=0.95,
        ),
        Panel(
            "Adapters",
            "Resident ones and room for them, by tier.",
            "short",
            [
                Query(f"sum by (tier) (rootstock_adapters_resident{{{JOB}}})", "{{tier}} resident"),
                Query(f"sum by (tier) (rootstock_adapter_slots{{{JOB}}})", "{{tier}} room"),
            ],
        ),
        Panel(
            "Adapters dropped",
            "capacity: pushed out by another. deleted: by its tenant.",
            "cps",
            [Query(rate("rootstock_adapter_evictions_total", by="reason"), "{{reason}}")],
        ),
        Panel(
            "Loading an adapter",
            "host: from the store, verified. device: into a slot.",
            "s",
            [
                Query(
                    "histogram_quantile(0.95, sum by (le, tier)"
                    f" (rate(rootstock_adapter_load_seconds_bucket{{{JOB}}}{RATE})))",
                    "{{tier}} p95",
                )
            ],
        ),
        Panel(
            "Memory",
            "Of both processes, and what the container may use.",
            "bytes",
            [
                Query(f"sum by (process) (rootstock_process_resident_bytes{{{JOB}}})", "{{process}}"),
                Query(f"sum(rootstock_memory_limit_bytes{{{JOB}}})", "limit"),
            ],
        ),
        Panel(
            "Event loop",
            "How late the API's loop runs what is due; every answer waits that long.",
            "s",
            [
                Query(
                    f"histogram_quantile({quantile}, sum by (le)"
                    f" (rate(rootstock_event_loop_lag_seconds_bucket{{{JOB}}}{RATE})))",
                    f"p{quantile * 100:.0f}",
                )
                for quantile in (0.5, 0.99)
            ],
            bad_from=0.1,
        ),
    ],
)

_BROKEN = Section(
    "What broke",
    [
        Panel(
            "Starts and crashes",
            "Starts of the whole process; crashes of the engine that it survived.",
            "short",
            [
                Query(f"sum(changes(rootstock_start_time_seconds{{{JOB}}}[1h]))", "starts in an hour"),
                Query(f"sum(increase(rootstock_engine_restarts_total{{{JOB}}}[1h]))", "engine crashes in an hour"),
            ],
            width=12,
        ),
        Panel(
            "Adapters refused",
            "Stored adapters that failed a check when they were loaded.",
            "short",
            [Query(f"sum by (reason) (rootstock_adapter_verify_failures_total{{{JOB}}})", "{{reason}}")],
            width=12,
        ),
    ],
)

SERVICE_DASHBOARD = Dashboard(
    uid=SERVICE,
    title="Rootstock: service",
    description="Do users suffer, where does the time go, what is full, what broke.",
    variables=[JOBS],
    sections=[_USERS, _TRAFFIC, _LATENCY, _FULL, _BROKEN],
    others={TENANTS: "Tenants and drift", TRAINING: "Training"},
)
