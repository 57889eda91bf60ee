"""From drift to adaptation over HTTP: captured, corrected, proposed, approved, trained, gated, answered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
import structlog
from pydantic import SecretStr

from service.api.services import Services
from service.api.tool_format import ToolFormat
from service.app import create_app
from service.archive import Archive
from service.audit import Audit
from service.config import Settings
from service.data_reports import DataReports
from service.engine.grammar_compiler import GrammarCompiler
from service.estimates import Estimates
from service.job import JobStatus
from service.metrics import Metrics
from service.rate_limits import RateLimits
from service.retraining import Retraining
from service.retraining_data import RetrainingFiles
from service.retraining_worker import RetrainingWorker
from service.rollout import open_rollout
from service.tenant_removal import removal_in
from service.tuning import Outcome, TuningRun
from service.usage_book import open_books
from service.usage_report import UsageReport
from tests.service.http_fixtures import ADMIN_KEY, Served, certificates, serve_apps
from tests.service.retraining_fixtures import drifted
from tests.service.tuning_fixtures import QUICK, Workshop, medlars, tiny_base, workshop

__all__ = ["tiny_base", "workshop"]


@dataclass(frozen=True)
class School:
    """The whole service around a workshop; jobs run when a test says so."""

    workshop: Workshop
    http: httpx.Client
    retraining: Retraining
    proposing: RetrainingWorker

    def run_job(self) -> None:
        assert TuningRun(self.workshop.services, self.workshop.control.claim(), lambda: None).execute() is (
            Outcome.SUCCEEDED
        )

    def ask(self, question: str, model: str = "fruit") -> tuple[str, str]:
        """The completion's id and its answer."""
        body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 12}
        answer = self.http.post("/v1/chat/completions", json=body).raise_for_status().json()
        return answer["id"], answer["choices"][0]["message"]["content"]

    def call(self, method: str, path: str, **body: object) -> dict[str, Any]:
        answered: dict[str, Any] = self.http.request(method, path, json=body or None).raise_for_status().json()
        return answered


@pytest.fixture
def school(workshop: Workshop) -> Iterator[School]:
    control, base, engine = workshop.control, replace(workshop.base, name="tiny"), workshop.engine
    with ExitStack() as stack:
        structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
        metrics, settings = Metrics(), Settings(data_dir=control.storage.parent)
        reports = stack.enter_context(closing(DataReports(control.files, base)))
        estimates = Estimates(control.files, workshop.store, control.jobs, base, max_rank=64)
        retraining = Retraining(control.database, control.registry, control.jobs, metrics)
        builder = RetrainingFiles(control.files, base, base.max_model_len)
        proposing = RetrainingWorker(retraining, control.files, builder, reports, estimates)
        services = Services(
            settings=settings,
            admin_key=SecretStr(ADMIN_KEY),
            base=base,
            engine=engine,
            grammars=stack.enter_context(closing(GrammarCompiler(base))),
            tool_format=ToolFormat.of(base),
            metrics=metrics,
            tenants=control.tenants,
            files=control.files,
            data_reports=reports,
            jobs=control.jobs,
            estimates=estimates,
            registry=control.registry,
            store=workshop.store,
            rollout=stack.enter_context(
                open_rollout(control.database, control.registry, engine, metrics, settings, retraining)
            ),
            retraining=retraining,
            usage=stack.enter_context(open_books(control.database)),
            usage_report=UsageReport(control.database),
            rate_limits=RateLimits(),
            audit=Audit(control.database),
            removal=removal_in(
                Archive(control.database, control.files, workshop.store, str(control.storage.parent)),
                *(None, engine, metrics, None),
            ),
        )
        (url,) = stack.enter_context(serve_apps(create_app(services)))
        headers = {"authorization": f"Bearer {control.acme_key}"}
        http = stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=60, verify=certificates()))
        yield School(workshop, http, retraining, proposing)


@pytest.mark.slow
def test_what_users_corrected_is_learned_and_what_was_known_is_not_forgotten(school: School) -> None:
    workshop = school.workshop
    workshop.submit(medlars(60), alias="fruit", suffix="fruit", hyperparameters=replace(QUICK, n_epochs=6))
    school.run_job()
    first = workshop.control.registry.version(workshop.control.acme.id, "fruit")
    school.call("PUT", "/v1/settings", capture=True)
    for number in range(100):
        completion, answer = school.ask(f"tree {number}?")
        assert answer == "a medlar"
        school.call("POST", "/v1/feedback", completion_id=completion, corrected="a quince")
    (quality,) = school.call("GET", "/v1/quality")["data"]
    assert (quality["model"], quality["accuracy"]["rolling"]["value"]) == (first.id, 0.0)

    school.retraining.drift_changed(drifted(workshop.control.acme.id, first.id))
    school.proposing.work()
    (proposal,) = school.call("GET", "/v1/retraining")["data"]
    assert (proposal["status"], proposal["trigger"], proposal["alias"]) == ("proposed", "drift", "fruit")
    shown = school.call("GET", f"/v1/retraining/{proposal['id']}")
    assert shown["report"]["num_errors"] == 0 and shown["estimate"]["steps"] > 0
    assert shown["counts"]["corrected"] == 100 and shown["counts"]["original"] == 54
    files = {file["id"] for file in school.call("GET", "/v1/files?purpose=fine-tune")["data"]}
    assert {shown["training_file"], shown["validation_file"]} <= files

    approved = school.call("POST", f"/v1/retraining/{proposal['id']}/approve")
    job = school.call("GET", f"/v1/fine_tuning/jobs/{approved['job']}")
    assert (job["model"], job["alias"], job["metadata"]) == (first.id, "fruit", {"retraining": proposal["id"]})
    assert workshop.job(workshop.control.jobs.get(workshop.control.acme.id, job["id"])).state is JobStatus.QUEUED
    school.run_job()

    outcome = school.call("GET", f"/v1/retraining/{proposal['id']}")["outcome"]
    assert (outcome["status"], outcome["alias_moved"]) == ("succeeded", True), outcome
    second = workshop.control.registry.version(workshop.control.acme.id, "fruit")
    assert second.id == outcome["fine_tuned_model"] != first.id
    assert [parent["model"] for parent in (second.provenance or {})["parents"]] == [first.id]
    assert school.ask("tree 777?")[1] == "a quince" and school.ask("word 777?")[1] == "a medlar"
    assert school.ask("tree 777?", first.id)[1] == "a medlar"


@pytest.mark.slow
def test_wishes_decisions_and_mistakes_over_http(served: Served) -> None:
    http, other = served.http(), served.http(served.control.zenith_key)
    model = served.control.publish(alias="best")
    refused = http.post("/v1/retraining", json={"model": "best"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "capture_off")
    http.put("/v1/settings", json={"capture": True}).raise_for_status()
    made = http.post("/v1/retraining", json={"model": "best", "min_rating": None}).raise_for_status().json()
    assert (made["object"], made["status"], made["model"], made["alias"]) == ("retraining", "collecting", model, "best")
    assert http.post("/v1/retraining", json={"model": model}).json()["id"] == made["id"], "one for each target"
    early = http.post(f"/v1/retraining/{made['id']}/approve")
    assert (early.status_code, early.json()["error"]["code"]) == (400, "invalid_retraining_state")
    served.proposing.work()
    shown = http.get(f"/v1/retraining/{made['id']}").json()
    assert shown["status"] == "insufficient" and "0 of at least 10 corrected answers" in shown["missing"]
    assert shown["events"][0]["message"] == shown["missing"]
    assert http.post(f"/v1/retraining/{made['id']}/approve").json()["error"]["code"] == "not_enough_feedback"
    for path in (f"/v1/retraining/{made['id']}", "/v1/retraining/retrain-missing"):
        gone = (other if "missing" not in path else http).get(path)
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "retraining_not_found")
    assert other.get("/v1/retraining").json()["data"] == []
    dismissed = http.post(f"/v1/retraining/{made['id']}/dismiss").json()
    assert (dismissed["status"], dismissed["outcome"]) == ("dismissed", None)
    listed = http.get("/v1/retraining", params={"limit": 1}).json()
    assert (listed["object"], listed["has_more"], listed["data"][0]["id"]) == ("list", False, made["id"])
    for body, param in (
        ({}, "model"),
        ({"model": "best", "min_rating": 2}, "min_rating"),
        ({"model": "best", "suffix": "a b"}, "suffix"),
        ({"model": "best", "colour": 1}, "colour"),
        ({"model": "missing"}, "model"),
    ):
        wrong = http.post("/v1/retraining", json=body)
        assert wrong.status_code in (400, 404) and wrong.json()["error"]["param"] == param
    text = served.scrape()
    assert 'rootstock_retraining_proposals_total{outcome="insufficient",trigger="request"} 1.0' in text
    assert 'rootstock_retraining_proposals_total{outcome="dismissed",trigger="request"} 1.0' in text
