"""What a job would take: asked beforehand through HTTP, told by the job itself, compared at its end."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from service.errors import DeadlineExceededError, RateLimitError
from service.estimates import Estimates
from service.job import JobSpec, JobStatus
from service.tuning import Outcome, TuningRun
from tests.service.http_fixtures import Served
from tests.service.tuning_fixtures import Workshop, medlars, tiny_base, workshop

__all__ = ["tiny_base", "workshop"]


def _upload(served: Served, count: int = 20) -> str:
    content = b"".join(json.dumps(row).encode() + b"\n" for row in medlars(count))
    return served.client().files.create(file=("train.jsonl", content), purpose="fine-tune").id


def _estimate(served: Served, **fields: Any) -> httpx.Response:
    return served.http().post("/v1/fine_tuning/estimate", json={"model": "tiny", **fields})


def test_an_estimate_is_made_without_a_job(served: Served) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 4}}}
    response = _estimate(served, training_file=_upload(served), seed=1, method=method)
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["object"], body["training_examples"], body["validation_examples"]) == (
        "fine_tuning.estimate",
        16,
        4,
    )
    assert (body["steps"], body["hyperparameters"]["n_epochs"]) == (12, 3)
    assert body["tokens"] > 16 * 3 * 10 and body["peak_memory_bytes"] > 0
    assert body["seconds"] is None, "no job has ever run here"
    assert served.control.jobs.list(served.control.acme.id).items == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"training_file": "file-none"}, "training_file"),
        ({"hyperparameters": {"lora_r": 4096}}, "hyperparameters.lora_r"),
        ({"training": 1}, "training"),
        ({"method": {"type": "dpo"}}, "training_file"),
        ({"alias": "tiny"}, "alias"),
        ({"hyperparameters": {"target_modules": ["no_such_proj"]}}, None),
    ],
    ids=str,
)
def test_what_a_job_would_be_refused_for_is_refused(served: Served, fields: dict[str, Any], param: str | None) -> None:
    response = _estimate(served, **{"training_file": _upload(served), **fields})
    assert response.status_code == 400, response.text
    assert param is None or response.json()["error"]["param"] == param


def test_a_file_that_cannot_be_trained_on_is_refused_by_name(served: Served) -> None:
    response = _estimate(served, training_file=_upload(served, count=3))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_n_examples"


def test_an_estimate_that_takes_too_long_ends_and_frees_its_seat(workshop: Workshop) -> None:
    control = workshop.control
    spec = JobSpec("tiny", "tiny", workshop.upload(medlars(20)), 1)
    hasty = Estimates(control.files, workshop.store, control.jobs, workshop.base, max_rank=64, limit_seconds=-1.0)
    for _ in range(2):
        with pytest.raises(DeadlineExceededError):
            hasty.make(control.acme.id, spec)


def test_a_tenant_has_one_estimate_made_at_a_time(workshop: Workshop) -> None:
    control = workshop.control
    spec = JobSpec("tiny", "tiny", workshop.upload(medlars(20)), 1)
    estimates = Estimates(control.files, workshop.store, control.jobs, workshop.base, max_rank=64)
    with estimates._seat(control.acme.id), pytest.raises(RateLimitError):
        estimates.make(control.acme.id, spec)
    assert estimates.make(control.acme.id, spec).estimate.steps > 0


@pytest.mark.slow
def test_a_job_tells_its_estimate_and_compares_it_with_the_truth(workshop: Workshop) -> None:
    job = workshop.submit()
    estimates = Estimates(workshop.control.files, workshop.store, workshop.control.jobs, workshop.base, max_rank=64)
    asked = estimates.make(workshop.control.acme.id, job.spec).estimate
    assert TuningRun(workshop.services, workshop.control.claim(), lambda: None).execute() is Outcome.SUCCEEDED
    done = workshop.job(job)
    assert done.status is JobStatus.SUCCEEDED and done.estimate is not None
    predicted, actual, ratios = (done.estimate[name] for name in ("predicted", "actual", "ratios"))
    assert (predicted["tokens"], predicted["steps"]) == (asked.tokens, asked.steps)
    assert predicted["peak_memory_bytes"] == asked.peak_memory_bytes
    assert (actual["tokens"], actual["steps"]) == (done.trained_tokens, 15)
    assert ratios["tokens"] == ratios["steps"] == 1.0
    assert ratios["seconds"] == pytest.approx(predicted["seconds"] / actual["seconds"])
    assert actual["peak_memory_bytes"] is None, "a CPU counts no tensors"
    messages = workshop.messages(job)
    told = next(i for i, message in enumerate(messages) if message.startswith("Estimated: "))
    first = next(i for i, message in enumerate(messages) if message.startswith("Step 1/"))
    compared = next(i for i, message in enumerate(messages) if message.startswith("The estimate against the truth"))
    assert told < first < compared
    assert done.fine_tuned_model is not None
    version = workshop.control.registry.version(workshop.control.acme.id, done.fine_tuned_model)
    assert version.metrics["estimate"] == done.estimate
    again = estimates.make(workshop.control.acme.id, job.spec).estimate
    assert again.seconds == pytest.approx(actual["seconds"], rel=0.01), "the pace of the last job is remembered"
    assert workshop.control.jobs.tokens_per_second("another base") is None
