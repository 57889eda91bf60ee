"""A real Prometheus scrapes the real service; every query of every dashboard and rule is run against it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.monitoring.queries import DASHBOARDS, RULES, Expression, of_dashboards, of_rules, variables
from tests.running_prometheus import Prometheus, prometheus_scraping
from tests.running_service import Running, rootstock_serve
from tests.test_end_to_end import HYPERPARAMETERS, ask, await_job, rows

pytestmark = pytest.mark.slow

EMPTY_UNTIL = {
    "ALERTS": "an alert fires",
    "rootstock_adapter_verify_failures_total": "a stored adapter is damaged",
    "rootstock_adapter_evictions_total": "adapters do not fit",
    "rootstock_job_silence_seconds_max": "a job is unfinished",
    "rootstock_memory_limit_bytes": "the container has a limit",
    "rootstock_decode_step_p99_seconds": "training runs beside answers under a latency target",
    "rootstock_canary_ends_total": "a canary is taken back",
    "rootstock_canary_requests_total": "an alias has a canary",
    "rootstock_shadow_requests_total": "an alias has a shadow",
    "rootstock_feedback_total": "a user rates an answer",
    "rootstock_drift_statistic_ratio": "an adapter has had enough traffic to be judged",
    "rootstock_drift_state": "an adapter's traffic is watched",
    "rootstock_drift_samples": "an adapter's traffic is watched",
    "rootstock_drift_probes_total": "a conversation with an adapter begins",
    "rootstock_tenant_accuracy": "enough answers are judged",
    "rootstock_tenant_feedback_total": "a user rates an answer",
    "rootstock_retraining_proposals_total": "drift or falling quality proposes to train again",
    "rootstock_drift_webhooks_total": "a webhook is set, and drift changes",
}
"""Metrics whose queries may rightly show nothing after ordinary traffic and one job, and until when."""


@pytest.fixture(scope="module")
def watched(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A service that has answered, trained and served an adapter while Prometheus looked on."""
    directory = tmp_path_factory.mktemp("watched")
    with rootstock_serve(tiny_llama_dir, directory) as running, running.client() as client:
        target = running.ops_url.removeprefix("http://")
        with prometheus_scraping(target, RULES, directory) as prometheus:
            _use(running, client)
            yield prometheus


def _use(running: Running, client: openai.OpenAI) -> None:
    """Two scrapes before, so that rates see everything; and a pause after, so that the last is scraped."""
    time.sleep(2.5)
    (base,) = (model.id for model in client.models.list())
    file = client.files.create(file=("colours.jsonl", rows()), purpose="fine-tune")
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {**HYPERPARAMETERS, "n_epochs": 2}}}
    job = client.fine_tuning.jobs.create(model=base, training_file=file.id, seed=1, method=method)
    job = await_job(client, job.id, lambda j: j.status == "succeeded", lambda: ask(client, base))
    for thing in ("lemon", "plum", "coal"):
        ask(client, str(job.fine_tuned_model), thing)
    time.sleep(3.5)


def test_the_service_is_scraped_and_every_rule_is_healthy(watched: Prometheus) -> None:
    (target,) = watched.get("targets")["activeTargets"]
    assert target["health"] == "up", target["lastError"]
    listed = [rule for group in watched.get("rules")["groups"] for rule in group["rules"]]
    assert len(listed) == len(of_rules())
    assert [(rule["name"], rule["lastError"]) for rule in listed if rule["health"] != "ok"] == []


def test_nothing_fires_while_all_is_well(watched: Prometheus) -> None:
    assert watched.query('ALERTS{alertstate="firing"}') == []


def test_every_panel_shows_something_unless_what_it_shows_has_not_happened(watched: Prometheus) -> None:
    end = time.time()
    empty = []
    for expression in of_dashboards():
        if expression.target.get("range"):
            window = {"start": str(end - 60), "end": str(end), "step": "5"}
            found = watched.get("query_range", query=expression.expr, **window)["result"]
        else:
            found = watched.query(expression.expr)
        if not found and not expression.metrics & set(EMPTY_UNTIL):
            empty.append(f"{expression.where}: {expression.expr}")
    assert empty == []


def test_every_recording_rule_records_and_every_alert_can_be_asked(watched: Prometheus) -> None:
    records = [e for e in of_rules() if "record" in e.target]
    assert [e.where for e in records if not watched.query(e.target["record"])] == []
    for expression in of_rules():
        found = watched.query(expression.expr)
        assert found or "alert" in expression.target, expression.expr


def test_shares_of_the_objectives_are_numbers_and_none_failed(watched: Prometheus) -> None:
    shares = {s["metric"]["slo"]: float(s["value"][1]) for s in watched.query("job:rootstock_slo_errors:ratio_rate5m")}
    assert set(shares) == {"availability", "first_token", "inter_token"}
    assert shares["availability"] == 0 and all(0 <= share < 0.5 for share in shares.values())


def test_every_name_of_a_line_is_a_label_of_its_series(watched: Prometheus) -> None:
    """A legend `{{teant}}` would be an empty name; Grafana says nothing of it."""
    for expression in of_dashboards():
        legend = expression.target.get("legendFormat", "")
        wanted = {part.partition("}}")[0] for part in legend.split("{{")[1:]}
        for found in watched.query(expression.expr):
            assert wanted <= set(found["metric"]), expression.where


def test_the_variables_have_values_to_choose_from(watched: Prometheus) -> None:
    for path in DASHBOARDS:
        for selector, label in variables(path):
            values = watched.get(f"label/{label}/values", **{"match[]": selector})
            assert values or Expression("", selector, {}).metrics & set(EMPTY_UNTIL), selector


def test_latency_panels_have_the_trace_of_a_request(watched: Prometheus) -> None:
    end = time.time()
    marked = [e for e in of_dashboards() if e.target.get("exemplar")]
    for expression in marked:
        found = watched.get("query_exemplars", query=expression.expr, start=str(end - 300), end=str(end))
        traces = [exemplar["labels"]["trace_id"] for one in found for exemplar in one["exemplars"]]
        assert traces and all(len(trace) == 32 for trace in traces), expression.where
