"""Metrics as a scraper sees them, read with Prometheus' own parsers."""

from __future__ import annotations

import os
from typing import Any

import pytest
import structlog
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from service.drift_board import Worst
from service.drift_states import DriftState
from service.engine.phases import PhaseTimes
from service.engine.sequence import FinishReason, SequenceReport
from service.job import JobStatus
from service.job_backlog import JobBacklog
from service.metrics import Metrics, Origin
from service.metrics.requests import DURATION_BUCKETS, OUTCOMES, TPOT_BUCKETS, TTFT_BUCKETS
from service.process_memory import resident_bytes
from tests.fakes import FakeEngine

CHAT = Origin("chat", "0af7651916cd43dd8448eb211c80319c")

CONTRACT = {
    "rootstock_time_to_first_token_seconds": ("histogram", {"operation"}),
    "rootstock_time_per_output_token_seconds": ("histogram", {"operation"}),
    "rootstock_request_duration_seconds": ("histogram", {"operation"}),
    "rootstock_queue_wait_seconds": ("histogram", {"operation"}),
    "rootstock_request_phase_seconds": ("histogram", {"operation", "phase"}),
    "rootstock_event_loop_lag_seconds": ("histogram", set()),
    "rootstock_adapter_load_seconds": ("histogram", {"tier"}),
    "rootstock_training_job_seconds": ("histogram", {"outcome"}),
    "rootstock_requests_total": ("counter", {"operation", "outcome"}),
    "rootstock_tokens_total": ("counter", {"type"}),
    "rootstock_prefix_cache_queries_total": ("counter", set()),
    "rootstock_prefix_cache_hits_total": ("counter", set()),
    "rootstock_adapter_evictions_total": ("counter", {"reason"}),
    "rootstock_adapter_verify_failures_total": ("counter", {"reason"}),
    "rootstock_alias_fallbacks_total": ("counter", {"outcome"}),
    "rootstock_adapters_checked_total": ("counter", set()),
    "rootstock_store_last_check_timestamp_seconds": ("gauge", set()),
    "rootstock_adapters_stale": ("gauge", set()),
    "rootstock_canary_requests_total": ("counter", {"arm", "outcome"}),
    "rootstock_canary_ends_total": ("counter", {"outcome", "reason"}),
    "rootstock_shadow_requests_total": ("counter", {"outcome"}),
    "rootstock_feedback_total": ("counter", {"rating"}),
    "rootstock_completion_records_dropped_total": ("counter", set()),
    "rootstock_drift_probes_total": ("counter", {"outcome"}),
    "rootstock_drift_probe_seconds_total": ("counter", {"beside"}),
    "rootstock_drift_alarms_total": ("counter", {"signal"}),
    "rootstock_drift_expected_false_alarms_total": ("counter", set()),
    "rootstock_drift_failures_total": ("counter", set()),
    "rootstock_drift_webhooks_total": ("counter", {"outcome"}),
    "rootstock_drift_statistic_ratio": ("gauge", {"tenant", "signal"}),
    "rootstock_drift_state": ("gauge", {"tenant", "signal", "state"}),
    "rootstock_drift_samples": ("gauge", {"tenant"}),
    "rootstock_jobs_total": ("counter", {"state"}),
    "rootstock_job_fenced_writes_total": ("counter", set()),
    "rootstock_training_pace_ratio": ("gauge", set()),
    "rootstock_training_held_seconds_total": ("counter", set()),
    "rootstock_decode_step_p99_seconds": ("gauge", set()),
    "rootstock_engine_restarts_total": ("counter", set()),
    "rootstock_tenant_label_overflow_total": ("counter", set()),
    "rootstock_tenant_requests_total": ("counter", {"tenant"}),
    "rootstock_tenant_feedback_total": ("counter", {"tenant"}),
    "rootstock_tenant_accuracy": ("gauge", {"tenant"}),
    "rootstock_retraining_proposals_total": ("counter", {"trigger", "outcome"}),
    "rootstock_tenant_errors_total": ("counter", {"tenant"}),
    "rootstock_tenant_request_seconds_total": ("counter", {"tenant"}),
    "rootstock_tenant_tokens_total": ("counter", {"tenant", "type"}),
    "rootstock_tenant_first_tokens_total": ("counter", {"tenant"}),
    "rootstock_tenant_first_token_seconds_total": ("counter", {"tenant"}),
    "rootstock_requests_running": ("gauge", set()),
    "rootstock_requests_waiting": ("gauge", set()),
    "rootstock_adapters_resident": ("gauge", {"tier"}),
    "rootstock_adapter_slots": ("gauge", {"tier"}),
    "rootstock_adapters_pinned": ("gauge", set()),
    "rootstock_kv_cache_usage_ratio": ("gauge", set()),
    "rootstock_lease_age_seconds_max": ("gauge", set()),
    "rootstock_process_resident_bytes": ("gauge", {"process"}),
    "rootstock_jobs_unfinished": ("gauge", {"state"}),
    "rootstock_job_silence_seconds_max": ("gauge", {"state"}),
    "rootstock_ready": ("gauge", set()),
    "rootstock_start_time_seconds": ("gauge", set()),
    "rootstock_memory_limit_bytes": ("gauge", set()),
}


@pytest.fixture
def metrics() -> Metrics:
    """With something in every series."""
    metrics = Metrics(max_tenant_labels=2, router_aliases=True)
    metrics.watch_engine(FakeEngine().stats)
    metrics.watch_leases(lambda: 4.5)
    metrics.watch_stale(lambda: 1)
    metrics.alias_fell_back("moved")
    metrics.watch_processes(lambda: resident_bytes({"api": os.getpid(), "engine": None}))
    metrics.watch_jobs(lambda: JobBacklog({"queued": 2, "running": 0}, {"queued": 90.0}))
    metrics.watch_process(lambda: True, 1 << 30)
    metrics.request_finished(CHAT, "tenant-a", "success", 0.2)
    metrics.sequence_submitted("chatcmpl-1-0", CHAT)
    metrics.sequence_finished(report("chatcmpl-1-0"))
    metrics.adapter_loaded("device", 0.02)
    metrics.loop_lagged(0.003)
    metrics.adapter_evicted("capacity")
    metrics.adapter_verify_failed("digest")
    metrics.job_entered(JobStatus.QUEUED)
    metrics.write_fenced()
    metrics.drift.drift_probe_ended("measured")
    metrics.drift.drift_alarmed("refusal")
    metrics.drift.drift_webhook_ended("delivered")
    worst = Worst({"refusal": 1.5}, {"refusal": DriftState.DRIFT}, 40)
    metrics.drift.watch(lambda label: {label("tenant-a"): worst})
    metrics.canary_answered("canary", "success")
    metrics.canary_ended("rolled_back", "error")
    metrics.shadow_ended("compared")
    metrics.feedback_given("tenant-a", 1.0)
    metrics.watch_quality(lambda: {"tenant-a": 0.75, "tenant-z": 0.5})
    metrics.retraining_moved("drift", "proposed")
    metrics.job_run_finished("succeeded", 12.0)
    metrics.tokens_trained(100)
    return metrics


def report(request_id: str, tenant: str = "tenant-a") -> SequenceReport:
    """Arrived at 100.0 on the machine's clock."""
    return SequenceReport(
        request_id,
        tenant,
        "a" * 64,
        FinishReason.STOP,
        num_prompt_tokens=7,
        num_output_tokens=3,
        queue_seconds=0.004,
        ttft_seconds=0.03,
        e2e_seconds=0.1,
        inter_token_seconds=(0.01, 0.02),
        num_cached_tokens=5,
        arrival=100.0,
        phases=PhaseTimes(100.002, 100.003, 100.004).phases(100.0, 100.03, 100.1),
    )


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text, _ = metrics.exposition("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse_text(text.decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((f"rootstock_{name}", tuple(sorted(labels.items()))))


def test_every_name_of_the_contract_is_there_with_its_labels_and_nothing_else(metrics: Metrics) -> None:
    found: dict[str, tuple[str, set[str]]] = {}
    for family in parse_text(metrics.exposition("text/plain")[0].decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels)
    assert {name: kind for name, kind in found.items() if name.startswith("rootstock_")} == CONTRACT
    assert {name for name in found if not name.startswith("rootstock_")} == {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:lora_requests_info",
    }


@pytest.mark.parametrize(
    ("name", "buckets"),
    [
        ("time_to_first_token_seconds", TTFT_BUCKETS),
        ("time_per_output_token_seconds", TPOT_BUCKETS),
        ("request_duration_seconds", DURATION_BUCKETS),
    ],
)
def test_buckets_are_those_of_the_contract(metrics: Metrics, name: str, buckets: tuple[float, ...]) -> None:
    edges = {
        float(dict(labels)["le"])
        for (sample, labels) in samples(metrics)
        if sample == f"rootstock_{name}_bucket" and ("operation", "chat") in labels
    }
    assert edges == {*buckets, float("inf")}


def test_a_sequence_is_counted_under_the_operation_that_asked_for_it(metrics: Metrics) -> None:
    metrics.sequence_finished(report("eval-1"))
    assert value(metrics, "time_to_first_token_seconds_count", operation="chat") == 1
    assert value(metrics, "time_per_output_token_seconds_count", operation="chat") == 2
    assert value(metrics, "time_to_first_token_seconds_count", operation="internal") == 1
    assert value(metrics, "tokens_total", type="prompt") == 14
    assert value(metrics, "tokens_total", type="completion") == 6
    assert value(metrics, "tokens_total", type="cached") == 10
    assert value(metrics, "tokens_total", type="training") == 100
    assert (value(metrics, "prefix_cache_queries_total"), value(metrics, "prefix_cache_hits_total")) == (14, 10)


def test_the_counters_of_an_expected_operation_begin_at_zero_with_every_outcome(metrics: Metrics) -> None:
    metrics.expect_operations(["chat", "files"])
    counted = {outcome: value(metrics, "requests_total", operation="files", outcome=outcome) for outcome in OUTCOMES}
    assert counted == dict.fromkeys(OUTCOMES, 0.0)
    assert value(metrics, "requests_total", operation="chat", outcome="success") == 1


def test_readiness_is_asked_at_each_scrape_and_an_unlimited_memory_has_no_series() -> None:
    ready, metrics = [True], Metrics()
    metrics.watch_process(lambda: ready[0], None)
    assert value(metrics, "ready") == 1
    ready[0] = False
    assert value(metrics, "ready") == 0 and value(metrics, "memory_limit_bytes") is None


def test_a_state_without_jobs_is_counted_as_zero_and_has_no_age(metrics: Metrics) -> None:
    assert value(metrics, "jobs_unfinished", state="running") == 0
    assert value(metrics, "job_silence_seconds_max", state="running") is None
    assert value(metrics, "job_silence_seconds_max", state="queued") == 90


def test_what_was_refused_has_no_duration(metrics: Metrics) -> None:
    metrics.request_finished(CHAT, None, "rejected", 0.001)
    assert value(metrics, "requests_total", operation="chat", outcome="rejected") == 1
    assert value(metrics, "request_duration_seconds_count", operation="chat") == 1


def test_openmetrics_is_spoken_when_asked_for_and_its_exemplars_carry_the_trace_id(metrics: Metrics) -> None:
    text, content_type = metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    exemplars: list[Any] = [
        sample.exemplar
        for family in parse_openmetrics(text.decode())
        if family.name == "rootstock_time_to_first_token_seconds"
        for sample in family.samples
        if sample.exemplar
    ]
    assert [exemplar.labels for exemplar in exemplars] == [{"trace_id": CHAT.trace_id}]


@pytest.mark.parametrize(
    "name",
    [
        "time_to_first_token_seconds",
        "time_per_output_token_seconds",
        "request_duration_seconds",
        "queue_wait_seconds",
        "request_phase_seconds",
    ],
)
def test_every_latency_histogram_leads_to_the_trace(metrics: Metrics, name: str) -> None:
    assert exemplars_of(metrics, name) == {CHAT.trace_id}


def exemplars_of(metrics: Metrics, name: str) -> set[str]:
    text, _ = metrics.exposition("application/openmetrics-text; version=1.0.0")
    return {
        sample.exemplar.labels["trace_id"]
        for family in parse_openmetrics(text.decode())
        if family.name == f"rootstock_{name}"
        for sample in family.samples
        if sample.exemplar
    }


def test_the_phases_of_a_sequence_follow_each_other_and_add_up_to_its_time(metrics: Metrics) -> None:
    phases = {
        phase: value(metrics, "request_phase_seconds_sum", operation="chat", phase=phase)
        for phase in ("queue", "adapter_load", "prefill", "decode")
    }
    expected = {"queue": 0.002, "adapter_load": 0.001, "prefill": 0.027, "decode": 0.07}
    assert phases == pytest.approx(expected)
    assert sum(expected.values()) == pytest.approx(report("x").e2e_seconds)


def test_the_time_to_the_first_token_begins_when_the_request_reaches_the_service() -> None:
    metrics = Metrics()
    metrics.sequence_submitted("chatcmpl-1-0", Origin("chat", CHAT.trace_id, arrival=99.5))
    metrics.sequence_finished(report("chatcmpl-1-0"))
    assert value(metrics, "time_to_first_token_seconds_sum", operation="chat") == pytest.approx(0.53)
    assert value(metrics, "tenant_first_token_seconds_total", tenant="tenant-a") == pytest.approx(0.53)
    assert value(metrics, "queue_wait_seconds_sum", operation="chat") == pytest.approx(0.004), "the engine's own"


def test_a_tenants_counters_tell_its_mean_latencies_and_its_errors(metrics: Metrics) -> None:
    metrics.request_finished(CHAT, "tenant-a", "error", 0.5)
    metrics.request_finished(CHAT, "tenant-a", "rejected", 0.1)
    assert value(metrics, "tenant_requests_total", tenant="tenant-a") == 3
    assert value(metrics, "tenant_request_seconds_total", tenant="tenant-a") == pytest.approx(0.8)
    assert value(metrics, "tenant_errors_total", tenant="tenant-a") == 1
    assert value(metrics, "tenant_first_tokens_total", tenant="tenant-a") == 1
    assert value(metrics, "tenant_tokens_total", tenant="tenant-a", type="prompt") == 7
    assert value(metrics, "tenant_tokens_total", tenant="tenant-a", type="completion") == 3
    assert value(metrics, "tenant_tokens_total", tenant="tenant-a", type="cached") == 5


def test_what_the_service_does_for_itself_is_no_tenants(metrics: Metrics) -> None:
    metrics.sequence_finished(report("eval-1", tenant="tenant-b"))
    assert value(metrics, "tenant_tokens_total", tenant="tenant-b", type="prompt") is None
    assert value(metrics, "time_to_first_token_seconds_count", operation="internal") == 1


def test_nothing_of_a_deleted_tenant_is_left(metrics: Metrics) -> None:
    assert any(("tenant", "tenant-a") in labels for _, labels in samples(metrics))
    metrics.forget_tenant("tenant-a")
    assert not any(("tenant", "tenant-a") in labels for _, labels in samples(metrics))


def test_a_process_that_is_not_there_has_no_memory(metrics: Metrics) -> None:
    assert (value(metrics, "process_resident_bytes", process="api") or 0) > 1 << 20
    assert value(metrics, "process_resident_bytes", process="engine") is None


def test_two_services_in_one_process_count_apart(metrics: Metrics) -> None:
    assert value(Metrics(), "requests_total", operation="chat", outcome="success") is None


def test_tenants_beyond_the_cap_share_a_label_and_are_counted_as_overflow(metrics: Metrics) -> None:
    for tenant in ("tenant-b", "tenant-c", "tenant-d"):
        metrics.request_finished(CHAT, tenant, "success", 0.1)
    assert value(metrics, "tenant_requests_total", tenant="tenant-b") == 1
    assert value(metrics, "tenant_requests_total", tenant="_other") == 2
    assert value(metrics, "tenant_requests_total", tenant="tenant-c") is None
    assert value(metrics, "tenant_label_overflow_total") == 2


def test_a_busy_latecomer_takes_the_label_of_a_quiet_tenant(metrics: Metrics) -> None:
    for tenant in ["tenant-b"] * 6 + ["tenant-c"] * 6:
        metrics.request_finished(CHAT, tenant, "success", 0.1)
    assert value(metrics, "tenant_requests_total", tenant="tenant-a") is None
    assert value(metrics, "tenant_requests_total", tenant="tenant-b") == 6
    assert value(metrics, "tenant_requests_total", tenant="tenant-c") == 1  # its first five went to _other
    assert value(metrics, "tenant_requests_total", tenant="_other") == 5


def test_a_deleted_tenants_series_end_and_its_label_is_free(metrics: Metrics) -> None:
    metrics.request_finished(CHAT, "tenant-b", "success", 0.1)
    metrics.forget_tenant("tenant-a")
    metrics.request_finished(CHAT, "tenant-a", "success", 0.1)  # it was still running
    metrics.request_finished(CHAT, "tenant-c", "success", 0.1)
    assert value(metrics, "tenant_requests_total", tenant="tenant-a") is None
    assert value(metrics, "tenant_requests_total", tenant="tenant-c") == 1


def test_deleting_a_tenant_that_never_asked_for_anything_is_no_error(metrics: Metrics) -> None:
    metrics.forget_tenant("tenant-z")


def test_routers_see_loaded_adapters_as_running_and_none_in_two_lists(metrics: Metrics) -> None:
    (labels,) = [dict(labels) for (name, labels) in samples(metrics) if name == "vllm:lora_requests_info"]
    assert labels == {
        "max_lora": "32",
        "running_lora_adapters": "a" * 64,
        "waiting_lora_adapters": "c" * 64,
    }


def test_how_training_is_held_back_can_be_seen(metrics: Metrics) -> None:
    assert value(metrics, "training_pace_ratio") == 1.0
    metrics.training_paced(0.25, None, 1.5)
    metrics.training_paced(0.5, 0.021, 1.0)
    assert value(metrics, "training_pace_ratio") == 0.5
    assert value(metrics, "training_held_seconds_total") == 2.5
    assert value(metrics, "decode_step_p99_seconds") == 0.021


def test_a_gauge_that_cannot_be_read_leaves_the_rest_of_the_scrape(metrics: Metrics) -> None:
    def fail() -> float:
        raise ConnectionError("the database is away")

    broken = Metrics()
    broken.watch_engine(FakeEngine().stats)
    broken.watch_leases(fail)
    with structlog.testing.capture_logs() as logs:
        assert value(broken, "lease_age_seconds_max") is None
    assert value(broken, "requests_waiting") == 3
    assert logs[0]["event"] == "scrape_incomplete"


def test_without_the_flag_no_foreign_name_is_exported() -> None:
    metrics = Metrics()
    metrics.watch_engine(FakeEngine().stats)
    assert b"vllm:" not in metrics.exposition("")[0]
