"""What a job measures of its candidate before it is published, and what the gate makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from adapters.assertions import parse_assertions
from adapters.gate import GatePolicy
from service.job import EvaluationSpec, EventLevel, Job, JobStatus
from service.tuning import Outcome, TuningRun
from tests.service.tuning_fixtures import QUICK, Workshop, medlars, tiny_base, workshop

__all__ = ["tiny_base", "workshop"]

LEARNS = replace(QUICK, n_epochs=6)
LEARNS_NOTHING = replace(QUICK, learning_rate=1e-30, n_epochs=1)


def _run(workshop: Workshop) -> Outcome:
    return TuningRun(workshop.services, workshop.control.claim(), lambda: None).execute()


def _report(workshop: Workshop, job: Job) -> dict[str, Any]:
    model = workshop.job(job).fine_tuned_model
    assert model is not None
    report: dict[str, Any] = workshop.control.registry.version(workshop.control.acme.id, model).metrics["evaluation"]
    return report


def _active(workshop: Workshop) -> str:
    return workshop.control.registry.aliases.get(workshop.control.acme.id, "fruit").model


def _messages(workshop: Workshop, job: Job, start: str) -> list[str]:
    return [message for message in workshop.messages(job) if message.startswith(start)]


@pytest.mark.slow
def test_a_clear_gain_moves_the_alias_and_a_worse_candidate_leaves_it(workshop: Workshop) -> None:
    held_out = workshop.upload(medlars(24))
    good = workshop.submit(alias="fruit", validation_file=held_out, hyperparameters=LEARNS)
    assert _run(workshop) is Outcome.SUCCEEDED
    assert _active(workshop) == workshop.job(good).fine_tuned_model
    report = _report(workshop, good)
    assert (report["task"], report["primary"], report["num_examples"]) == ("labels", "accuracy", 24)
    assert report["source"] == "validation_file" and report["active_model"] is None
    assert report["scores"]["candidate"]["accuracy"]["value"] == 1.0
    assert report["comparisons"]["few_shot"]["accuracy"]["p"] < 0.05
    assert report["forgetting"]["ratio"] > 1
    assert report["training"]["fit"] in ("good", "underfit")
    assert report["gate"]["passed"] and report["gate"]["fine_tuning_needed"] is True
    (told,) = _messages(workshop, good, "Gate passed")
    assert told == "Gate passed, alias 'fruit' moves to the new model"
    assert _messages(workshop, good, "Accuracy on 24 held-out examples: base 0%")
    assert _messages(workshop, good, "Forgetting: perplexity on general text is x ")
    assert _messages(workshop, good, "Fit of the training: ")

    bad = workshop.submit(alias="fruit", validation_file=held_out, hyperparameters=LEARNS_NOTHING)
    assert _run(workshop) is Outcome.SUCCEEDED
    done = workshop.job(bad)
    assert done.status is JobStatus.SUCCEEDED and done.fine_tuned_model is not None
    assert _active(workshop) == workshop.job(good).fine_tuned_model
    report = _report(workshop, bad)
    assert report["active_model"] == workshop.job(good).fine_tuned_model
    assert report["scores"]["active"]["accuracy"]["value"] == 1.0
    assert report["scores"]["active"]["loss"]["value"] == pytest.approx(
        _report(workshop, good)["scores"]["candidate"]["loss"]["value"], rel=1e-3
    )
    gate = report["gate"]
    assert (gate["passed"], gate["alias_moved"], gate["fine_tuning_needed"]) == (False, False, False)
    failed = [check["name"] for check in gate["checks"] if not check["passed"]]
    assert failed == ["min_gain_over_base", "min_gain_over_few_shot", "must_not_lose_to_active"]
    page = workshop.control.jobs.events(workshop.control.acme.id, bad.id, limit=1000)
    warnings = [event.message for event in page.items if event.level is EventLevel.WARN]
    (told,) = [message for message in warnings if message.startswith("Gate not passed")]
    assert told.startswith("Gate not passed, alias 'fruit' stays where it is: against the base alone")
    assert "fine-tuning was not needed" in told


@pytest.mark.slow
def test_few_examples_let_the_first_version_pass_and_hold_the_second(workshop: Workshop) -> None:
    jobs = []
    for _ in range(2):
        jobs.append(workshop.submit(alias="fruit", hyperparameters=LEARNS))
        assert _run(workshop) is Outcome.SUCCEEDED
    assert _active(workshop) == workshop.job(jobs[0]).fine_tuned_model
    for job, passed in zip(jobs, (True, False), strict=True):
        gate = _report(workshop, job)["gate"]
        assert gate["passed"] is passed
        assert gate["reasons"][-1] == "insufficient evidence: 4 examples, the policy asks for 20"


@pytest.mark.slow
def test_with_the_gate_off_whatever_succeeds_moves_the_alias(workshop: Workshop) -> None:
    job = workshop.submit(alias="fruit", gate=GatePolicy(enabled=False), hyperparameters=LEARNS_NOTHING)
    assert _run(workshop) is Outcome.SUCCEEDED
    assert _active(workshop) == workshop.job(job).fine_tuned_model


@pytest.mark.slow
def test_a_model_that_could_not_be_evaluated_moves_no_alias(workshop: Workshop) -> None:
    job = workshop.submit(alias="fruit", hyperparameters=LEARNS_NOTHING)
    workshop.engine.shutdown(0.0)
    assert _run(workshop) is Outcome.SUCCEEDED
    assert workshop.control.registry.aliases.list(workshop.control.acme.id) == []
    report = _report(workshop, job)
    assert report["gate"]["reasons"] == ["insufficient evidence: the model could not be evaluated"]
    assert "scores" not in report and report["training"]["reason"]


@pytest.mark.slow
def test_an_evaluation_file_brings_its_own_examples_slices_and_assertions(workshop: Workshop) -> None:
    rows: list[Any] = medlars(12)
    for index, row in enumerate(rows):
        row["metadata"] = {"shop": "north" if index < 6 else "south"}
    rows[0]["assertions"] = [{"max_length": 3}]
    options = EvaluationSpec(
        file=workshop.upload(rows),
        max_examples=10,
        num_shots=2,
        assertions=parse_assertions([{"contains": "medlar"}], "assertions"),
    )
    job = workshop.submit(evaluation=options, hyperparameters=LEARNS)
    assert _run(workshop) is Outcome.SUCCEEDED
    report = _report(workshop, job)
    assert (report["source"], report["num_examples"], report["num_shots"]) == ("evaluation_file", 10, 2)
    assert {part["field"] for part in report["slices"]} <= {"shop"}
    assert report["slices"] or report["num_small_slices"]
    (checked,) = report["assertions"]
    assert checked["assertion"] == {"contains": "medlar"}
    assert checked["pass_rate"] == {"base": 0.0, "few_shot": checked["pass_rate"]["few_shot"], "candidate": 1.0}
    assert report["scores"]["candidate"]["assertions"]["value"] in (0.9, 1.0)
    _, table = workshop.job(job).result_files
    with workshop.control.files.open(workshop.control.acme.id, table) as stream:
        lines = [json.loads(line) for line in stream.read().decode().splitlines()]
    assert len(lines) == 10 and all(line["answers"]["candidate"] == "a medlar" for line in lines)


@pytest.mark.slow
def test_a_mistake_in_the_evaluation_file_shows_before_the_training(workshop: Workshop) -> None:
    file = workshop.upload([*medlars(3), {"messages": []}])
    job = workshop.submit(evaluation=EvaluationSpec(file=file))
    assert _run(workshop) is Outcome.FAILED
    failed = workshop.job(job)
    assert failed.error is not None
    assert failed.error.param == "evaluation.file"
    assert "line 4: 'messages' must be a list" in failed.error.message
    assert not failed.trained_tokens


@pytest.mark.slow
def test_a_file_with_fewer_lines_than_asked_for_is_evaluated_whole(workshop: Workshop) -> None:
    evaluation = EvaluationSpec(file=workshop.upload(medlars(1)))
    job = workshop.submit(evaluation=evaluation, hyperparameters=LEARNS_NOTHING)
    assert _run(workshop) is Outcome.SUCCEEDED
    assert _report(workshop, job)["num_examples"] == 1
