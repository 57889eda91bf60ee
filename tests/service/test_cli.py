"""The command line against a running service; only the engine is a fake."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from service.cli import app
from service.job import EventLevel, EventType, Method, Preset
from tests.service.http_fixtures import ADMIN_KEY, Served

EXAMPLE = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}

Run = Callable[..., Result]


@pytest.fixture
def run(served: Served, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`rootstock …` as the tenant acme and as the administrator of the running service."""
    monkeypatch.setenv("ROOTSTOCK_URL", f"{served.url}/v1")
    monkeypatch.setenv("ROOTSTOCK_API_KEY", served.control.acme_key)
    monkeypatch.setenv("ROOTSTOCK_ADMIN_KEY", ADMIN_KEY)
    return lambda *arguments: CliRunner().invoke(app, arguments)


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text((json.dumps(EXAMPLE) + "\n") * 10)
    return path


def test_a_tenant_is_added_with_a_working_key_listed_and_removed(served: Served, run: Run) -> None:
    added = run("tenants", "add", "quince")
    assert added.exit_code == 0, added.output
    key = added.stdout.split("api key")[1].strip()
    assert served.client(key).models.list().data[0].id == "tiny"
    assert "quince" in run("tenants", "list").stdout
    assert run("tenants", "remove", "quince", "--yes").exit_code == 0
    assert served.http(key).get("/v1/models").status_code == 401
    assert "quince" not in run("tenants", "list").stdout


def test_removing_an_unknown_tenant_says_where_to_look(run: Run) -> None:
    removed = run("tenants", "remove", "nobody", "--yes")
    assert removed.exit_code == 1 and "rootstock tenants list" in removed.stderr


def test_tune_waits_shows_the_loss_and_prints_the_new_models_id(served: Served, run: Run, examples: Path) -> None:
    worker = threading.Thread(target=_work, args=(served, True))
    worker.start()
    tuned = run("tune", "--file", str(examples), "--model", "tiny", "--suffix", "fruit", "--epochs", "3", "--wait")
    worker.join()
    assert tuned.exit_code == 0, tuned.output
    (job,) = served.client().fine_tuning.jobs.list().data
    assert job.fine_tuned_model is not None and f"model {job.fine_tuned_model}" in tuned.stdout
    assert ":fruit:" in job.fine_tuned_model and job.hyperparameters.n_epochs == 3
    lines = tuned.stdout.splitlines()
    assert lines[0] == f"job {job.id} trains on train.jsonl"
    assert lines.index("step 1 of 2, loss 1.500") < lines.index("careful")


@pytest.mark.slow
def test_a_failed_job_is_an_exit_status_and_a_reason(served: Served, run: Run, examples: Path) -> None:
    worker = threading.Thread(target=_work, args=(served, False))
    worker.start()
    tuned = run("tune", "--file", str(examples), "--wait")
    worker.join()
    assert tuned.exit_code == 1 and "failed: line 3 is no JSON" in tuned.stderr


def test_tune_asks_for_method_preset_strictness_and_gate(served: Served, run: Run, examples: Path) -> None:
    options = ["--method", "dpo", "--preset", "light", "--strict", "--no-gate"]
    assert run("tune", "--file", str(examples), *options).exit_code == 0
    (created,) = served.client().fine_tuning.jobs.list().data
    job = served.control.jobs.get(served.control.acme.id, created.id)
    assert (job.spec.method, job.spec.preset, job.spec.strict) == (Method.DPO, Preset.LIGHT, True)
    assert job.spec.gate.as_dict()["enabled"] is False


def test_without_wait_tune_returns_once_the_job_is_created(served: Served, run: Run, examples: Path) -> None:
    assert run("tune", "--file", str(examples), "--alias", "best").exit_code == 0
    (job,) = served.client().fine_tuning.jobs.list().data
    assert (job.status, job.model) == ("validating_files", "tiny")


def test_tuning_a_missing_file_is_wrong_usage(run: Run) -> None:
    assert run("tune", "--file", "/nowhere.jsonl").exit_code == 2


def test_adapters_are_listed_shown_promoted_and_rolled_back(served: Served, run: Run) -> None:
    first = served.control.publish(suffix="one", digest="1" * 64)
    second = served.control.publish(suffix="two", digest="2" * 64)
    assert first in run("adapters", "list").stdout
    assert run("adapters", "promote", "best", first).stdout == f"best -> {first}\n"
    assert run("adapters", "promote", "best", second).stdout == f"best -> {second}\n"
    shown = run("adapters", "show", "best").stdout
    assert second in shown and "2" * 64 in shown and "valid_loss" in shown
    assert run("adapters", "rollback", "best").stdout == f"best -> {first}\n"


def test_a_refusal_is_told_with_the_services_words_and_the_request_id(run: Run) -> None:
    shown = run("adapters", "show", "ft:missing")
    assert shown.exit_code == 1
    assert "ft:missing" in shown.stderr and "404, request req_" in shown.stderr
    assert "Traceback" not in shown.output


def test_a_service_that_is_not_there_is_told_apart_from_a_refusal(run: Run) -> None:
    listed = run("adapters", "list", "--url", "http://127.0.0.1:9")
    assert listed.exit_code == 3 and "no answer from http://127.0.0.1:9" in listed.stderr


def test_without_a_key_the_command_names_the_variable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROOTSTOCK_API_KEY")
    listed = run("adapters", "list")
    assert listed.exit_code == 2 and "ROOTSTOCK_API_KEY" in listed.stderr


def test_a_bad_setting_stops_serve_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOTSTOCK_LOG_LEVEL", "loud")
    served = CliRunner().invoke(app, ["serve", "--port", "eighty"])
    assert served.exit_code == 2
    assert "--port (ROOTSTOCK_PORT)" in served.stderr and "--log-level (ROOTSTOCK_LOG_LEVEL)" in served.stderr


def test_serve_has_an_option_for_every_setting_but_the_secret_one() -> None:
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve", "--help"]).stdout
    for flag in ("--host", "--port", "--ops-port", "--base", "--data-dir", "--no-training", "--kv-cache-bytes"):
        assert flag in shown
    assert "--admin-key" not in shown


@pytest.mark.slow
def test_client_commands_do_not_load_the_machinery_of_the_service() -> None:
    code = (
        "import sys, service.cli; heavy = {'torch', 'transformers', 'fastapi', 'sqlalchemy', 'openai'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr


def _work(served: Served, succeeds: bool) -> None:
    """What a worker does with the next job."""
    queue, claims = served.control.queue, []

    def claimed() -> bool:
        claims.append(queue.claim("worker"))
        return claims[-1] is not None

    served.wait_until(claimed)
    claim = claims[-1]
    assert claim is not None
    if not succeeds:
        queue.fail(claim, code="invalid_training_file", message="line 3 is no JSON", param="training_file")
        return
    queue.files_validated(claim)
    data = {"step": 1, "total_steps": 2, "train_loss": 1.5}
    queue.event(claim, "step 1 of 2, loss 1.500", type=EventType.METRICS, data=data)
    queue.event(claim, "careful", level=EventLevel.WARN)
    served.control.finish(claim)


@pytest.mark.slow
def test_proposals_to_retrain_are_listed_approved_and_dismissed(served: Served, run: Run) -> None:
    served.control.publish(alias="best")
    http = served.http()
    http.put("/v1/settings", json={"capture": True}).raise_for_status()
    made = http.post("/v1/retraining", json={"model": "best"}).raise_for_status().json()["id"]
    served.proposing.work()
    listed = run("retraining", "list").stdout
    assert made in listed and "insufficient" in listed and "0 of at least 10" in listed
    refused = run("retraining", "approve", made)
    assert refused.exit_code == 1 and "0 of at least 10" in refused.stderr
    assert run("retraining", "dismiss", made).exit_code == 0
    assert "dismissed" in run("retraining", "list").stdout
