"""What is worth waking somebody for, or a ticket, beside the objectives: is it up, jobs, drift, memory, adapters.

Every alert has a section in docs/operations.md. A series that is absent says "unknown" and fires nothing, except
where being absent is the fault.
"""

from __future__ import annotations

from collections.abc import Iterator

from tools.monitoring.objectives import BY, USERS_ONLY
from tools.monitoring.rule import TENANTS, TRAINING, Alert, Group

UP = 'up{job=~"(.+/)?rootstock"}'
"""The operator names a job `namespace/podmonitor`, a plain scrape configuration just `rootstock`."""

OF = "{{ $labels.job }}"
OF_TENANT = "tenant {{ $labels.tenant }}"


def alert_groups() -> Iterator[Group]:
    yield Group("rootstock-service", list(_service()))
    yield Group("rootstock-tenants", list(_tenants()))
    yield Group("rootstock-jobs", list(_jobs()))
    yield Group("rootstock-drift", list(_drift()), interval="1m")
    yield Group("rootstock-memory", list(_memory()))


def _service() -> Iterator[Alert]:
    yield Alert(
        "RootstockDown",
        "page",
        f"{UP} == 0\nor\nabsent({UP})",
        "Prometheus cannot reach Rootstock: nobody is answered, or nobody can see whether",
        "No answer from {{ with $labels.instance }}{{ . }}{{ else }}any pod{{ end }} for five minutes.",
        for_="5m",
    )
    yield Alert(
        "RootstockNotReady",
        "page",
        f"max by ({BY}) (rootstock_ready) == 0",
        f"No pod of {OF} takes requests",
        "/readyz of every pod has failed for ten minutes; its answer says why.",
        for_="10m",
    )
    yield Alert(
        "RootstockCrashLoop",
        "page",
        f"max by ({BY}, pod, instance) (changes(rootstock_start_time_seconds[1h])) >= 3",
        f"{OF} starts again and again; each start takes as long as the base takes to load",
        "{{ with $labels.pod }}{{ . }}{{ else }}{{ $labels.instance }}{{ end }}: {{ $value }} restarts in an hour.",
    )
    yield Alert(
        "RootstockEngineRestarted",
        "ticket",
        f"sum by ({BY}, pod, instance) (increase(rootstock_engine_restarts_total[1h])) > 0",
        f"The engine of {OF} crashed and came back",
        "About {{ $value | humanize }} times in the last hour. Whoever was being answered got an error.",
    )
    yield Alert(
        "RootstockEventLoopLag",
        "ticket",
        f"""
        1 - sum by ({BY}) (rate(rootstock_event_loop_lag_seconds_bucket{{le="0.1"}}[10m]))
          / sum by ({BY}) (rate(rootstock_event_loop_lag_seconds_count[10m]))
        > 0.05
        """,
        f"Something blocks the event loop of {OF}: every answer waits for it",
        "{{ $value | humanizePercentage }} of the loop's turns come more than 0.1 s late.",
        for_="15m",
    )
    # The first failure makes the series, so no rate sees it. That the series is new means something only where the
    # service was scraped before, or is new itself: not after an hour without Prometheus.
    yield Alert(
        "RootstockAdapterVerificationFailed",
        "page",
        f"""
        sum by ({BY}, reason) (increase(rootstock_adapter_verify_failures_total[30m])) > 0
        or
        sum by ({BY}, reason) (
          (rootstock_adapter_verify_failures_total unless rootstock_adapter_verify_failures_total offset 30m)
          and on ({BY}, instance)
          (rootstock_ready offset 30m or time() - rootstock_start_time_seconds < 1800)
        ) > 0
        """,
        f"A stored adapter is not what was published: {OF} refuses to serve it",
        "The check {{ $labels.reason }} failed. The adapter's tenant gets errors until it is mended.",
    )


def _tenants() -> Iterator[Alert]:
    yield Alert(
        "RootstockTenantFails",
        "page",
        f"""
        (
          sum by ({BY}, tenant) (rate(rootstock_tenant_errors_total[15m]))
          / sum by ({BY}, tenant) (rate(rootstock_tenant_requests_total[15m]))
          > 0.5
        )
        and (sum by ({BY}, tenant) (increase(rootstock_tenant_errors_total[15m])) >= 10)
        """,
        f"Most requests of {OF_TENANT} fail",
        "{{ $value | humanizePercentage }} failed in the last 15 minutes. Others may be served well.",
        dashboard=TENANTS,
        for_="5m",
        variables=("tenant",),
    )
    yield Alert(
        "RootstockTenantLabelsFull",
        "ticket",
        f"""
        (
          sum by ({BY}) (rate(rootstock_tenant_requests_total{{tenant="_other"}}[1h]))
          / sum by ({BY}) (rate(rootstock_tenant_requests_total[1h]))
          > 0.2
        )
        and (sum by ({BY}) (increase(rootstock_tenant_label_overflow_total[1h])) > 0)
        """,
        f"{OF} has more busy tenants than labels: what happens to the rest cannot be told apart",
        "{{ $value | humanizePercentage }} of all requests are counted as _other.",
        dashboard=TENANTS,
        for_="1h",
    )


def _jobs() -> Iterator[Alert]:
    yield Alert(
        "RootstockJobLeaseStale",
        "ticket",
        f"max by ({BY}) (rootstock_lease_age_seconds_max) > 120",
        f"A running job of {OF} has lost its worker, and nobody takes it over",
        "No heartbeat for {{ $value | humanizeDuration }}.",
        dashboard=TRAINING,
        for_="5m",
    )
    yield Alert(
        "RootstockJobQueuedTooLong",
        "ticket",
        f'max by ({BY}) (rootstock_job_silence_seconds_max{{state="queued"}}) > 4 * 3600',
        f"A fine-tuning job of {OF} waits for hours to begin",
        "The job that has waited longest has been queued for {{ $value | humanizeDuration }}.",
        dashboard=TRAINING,
        for_="5m",
    )
    yield Alert(
        "RootstockTrainingStalled",
        "ticket",
        f'max by ({BY}) (rootstock_job_silence_seconds_max{{state="running"}}) > 30 * 60',
        f"A running job of {OF} gets nowhere",
        "Its worker lives, but the job has shown nothing for {{ $value | humanizeDuration }}.",
        dashboard=TRAINING,
        for_="5m",
    )


_IN_DRIFT = f'max by ({BY}, tenant, signal) (rootstock_drift_state{{state="drift"}}) == 1'


def _drift() -> Iterator[Alert]:
    yield Alert(
        "RootstockTenantDrift",
        "ticket",
        _IN_DRIFT,
        f"{OF_TENANT}: {{{{ $labels.signal }}}} no longer looks as it did",
        "One signal alone may be a false alarm, within the budget; look whether others follow.",
        dashboard=TENANTS,
        for_="10m",
        variables=("tenant", "signal"),
    )
    yield Alert(
        "RootstockTenantTrafficChanged",
        "page",
        f"""
        count by ({BY}, tenant) ({_IN_DRIFT}) >= 2
        or
        max by ({BY}, tenant) (
          max by ({BY}, tenant, signal) (rootstock_drift_statistic_ratio)
          and ({_IN_DRIFT})
        ) >= 2
        """,
        f"The traffic of {OF_TENANT} has really changed",
        "Several signals drift together, or one is twice over its threshold; chance does neither.",
        dashboard=TENANTS,
        for_="15m",
        variables=("tenant",),
    )
    yield Alert(
        "RootstockDriftReferenceStale",
        "ticket",
        f'max by ({BY}, tenant, signal) (rootstock_drift_state{{state="stale_reference"}}) == 1',
        f"Drift of {OF_TENANT} cannot be judged: the reference belongs to another base",
        "The signal {{ $labels.signal }} has nothing to be compared with.",
        dashboard=TENANTS,
        for_="1h",
        variables=("tenant", "signal"),
    )
    expected = f"sum by ({BY}) (increase(rootstock_drift_expected_false_alarms_total[1d]))"
    yield Alert(
        "RootstockDriftAlarmsBeyondBudget",
        "ticket",
        f"""
        sum by ({BY}) (increase(rootstock_drift_alarms_total[1d]))
        > {expected} + 4 * sqrt({expected}) + 4
        """,
        f"{OF} has more drift alarms than chance explains, over all tenants",
        "{{ $value | humanize }} alarms in a day: many tenants changed at once, or the monitors are wrong.",
        dashboard=TENANTS,
        for_="1h",
    )
    yield Alert(
        "RootstockDriftBudgetTooLarge",
        "ticket",
        f"{expected} > 5",
        f"{OF} is expected to raise more than five false drift alarms a day",
        "{{ $value | humanize }} a day by chance alone, at this traffic and run length.",
        dashboard=TENANTS,
        for_="6h",
    )
    probes = "rootstock_drift_probes_total"
    yield Alert(
        "RootstockDriftBlind",
        "ticket",
        f"""
        (
          sum by ({BY}) (rate({probes}{{outcome=~"dropped|failed"}}[1h]))
          / sum by ({BY}) (rate({probes}{{outcome=~"measured|dropped|failed"}}[1h]))
          > 0.5
        )
        and (sum by ({BY}) (increase({probes}{{outcome=~"dropped|failed"}}[1h])) >= 20)
        """,
        f"{OF} cannot measure most prompts that drift should be judged by",
        "{{ $value | humanizePercentage }} of the prompts that were chosen went unmeasured in the last hour.",
        dashboard=TENANTS,
        for_="1h",
    )


def _memory() -> Iterator[Alert]:
    where = f"{BY}, pod, instance"
    yield Alert(
        "RootstockMemoryNearLimit",
        "ticket",
        f"""
        sum by ({where}) (rootstock_process_resident_bytes)
        / max by ({where}) (rootstock_memory_limit_bytes)
        > 0.9
        """,
        f"{OF} is about to be killed for its memory",
        "Its processes hold {{ $value | humanizePercentage }} of what the container may use.",
        for_="10m",
    )
    yield Alert(
        "RootstockKvCacheFull",
        "ticket",
        f"""
        (max by ({where}) (rootstock_kv_cache_usage_ratio) > 0.95)
        and (max by ({where}) (rootstock_requests_waiting) > 0)
        """,
        f"Requests of {OF} wait because the KV cache is full",
        "{{ $value | humanizePercentage }} in use for a quarter of an hour while requests wait.",
        for_="15m",
    )
    evictions = 'rootstock_adapter_evictions_total{reason="capacity"}'
    yield Alert(
        "RootstockAdapterThrash",
        "ticket",
        f"""
        (
          sum by ({BY}) (rate({evictions}[15m]))
          / sum by ({BY}) (rate(rootstock_time_to_first_token_seconds_count{{{USERS_ONLY}}}[15m]))
          > 0.5
        )
        and (sum by ({BY}) (rate({evictions}[15m])) > 0.05)
        """,
        f"Adapters of {OF} push each other out of their slots",
        "{{ $value | humanize }} adapters are dropped for each request that begins.",
        for_="30m",
    )
