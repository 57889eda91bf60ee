"""One job's run: from files to a published adapter, and every way in which it may end otherwise."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters.lora_weights import LoraWeights
from adapters.trainer import Trainer
from service.files import FilePurpose
from service.heartbeat import StopReason, StopRequested
from service.job import Claim, EventLevel, EventType, Job, JobStatus, Method, Preset
from service.tuning import Outcome, TuningRun
from tests.service.tuning_fixtures import QUICK, Workshop, eager, medlars, tiny_base, workshop

__all__ = ["tiny_base", "workshop"]


class KilledError(BaseException):
    """The process is gone: nothing of the run's own clean-up happens."""


def _after(calls: int, error: BaseException, said: Callable[[], bool] = lambda: True) -> Callable[[], None]:
    """A `check` that raises at its n-th call once `said` is true."""
    remaining = calls

    def check() -> None:
        nonlocal remaining
        if remaining == calls and not said():
            return
        remaining -= 1
        if remaining == 0:
            raise error

    return check


def _in_training(workshop: Workshop, job: Job, calls: int, error: BaseException) -> Callable[[], None]:
    """A `check` that raises at its n-th call after the files have been read."""
    return _after(calls, error, lambda: any(m.startswith("Training on") for m in workshop.messages(job)))


def _run(workshop: Workshop, check: Callable[[], None] = lambda: None) -> Outcome:
    return TuningRun(workshop.services, workshop.control.claim(), check).execute()


def _straight(workshop: Workshop, job: Job) -> str:
    """The digest that an uninterrupted run of the same spec gives."""
    twin = workshop.control.create_job(workshop.control.acme, **job.spec.__dict__)
    assert _run(workshop) is Outcome.SUCCEEDED
    return workshop.digest(twin)


@pytest.mark.slow
def test_a_job_is_trained_evaluated_published_and_served(workshop: Workshop) -> None:
    before = workshop.base.parameter_hash()
    job = workshop.submit(suffix="fruit", hyperparameters=replace(QUICK, n_epochs=6))
    assert _run(workshop) is Outcome.SUCCEEDED
    done = workshop.job(job)
    assert done.status is JobStatus.SUCCEEDED
    assert done.fine_tuned_model == f"ft:tiny:acme:fruit:{job.id.removeprefix('ftjob-')[:8]}"
    assert workshop.answer("word 99?", workshop.digest(job)) == "a medlar"
    assert workshop.answer("word 99?", None) != "a medlar"
    assert workshop.base.parameter_hash() == before
    assert done.trained_tokens == workshop.tally.num_tokens > 0


@pytest.mark.slow
def test_events_tell_the_story_in_openais_words(workshop: Workshop) -> None:
    job = workshop.submit()
    assert _run(workshop) is Outcome.SUCCEEDED
    messages = workshop.messages(job)
    expected = [
        f"Validating training file: {job.spec.training_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Training on 20 sequences",
        "Step 1/15: training loss=",
        "Checkpoint created at step 5",
        "Step 15/15: training loss=",
        "Checkpoint created at step 15",
        "Accuracy on 4 held-out examples: base 0%",
        f"New fine-tuned model created: {workshop.job(job).fine_tuned_model}",
        "The job has successfully completed",
    ]
    found = [next(i for i, message in enumerate(messages) if message.startswith(start)) for start in expected]
    assert found == sorted(found)


@pytest.mark.slow
def test_metrics_events_carry_openais_names(workshop: Workshop) -> None:
    job = workshop.submit()
    _run(workshop)
    page = workshop.control.jobs.events(workshop.control.acme.id, job.id, limit=1000)
    metrics = [event.data for event in reversed(page.items) if event.type is EventType.METRICS]
    assert [data["step"] for data in metrics if data] == list(range(1, 16))
    last = metrics[-1]
    assert last is not None
    assert set(last) == {
        "step",
        "total_steps",
        "train_loss",
        "train_mean_token_accuracy",
        "valid_loss",
        "valid_mean_token_accuracy",
        "full_valid_loss",
        "full_valid_mean_token_accuracy",
    }


@pytest.mark.slow
def test_the_result_file_is_openais_table_with_a_row_per_step(workshop: Workshop) -> None:
    job = workshop.submit()
    _run(workshop)
    file_id, _ = workshop.job(job).result_files
    file = workshop.control.files.get(workshop.control.acme.id, file_id)
    assert (file.filename, file.purpose) == ("step_metrics.csv", FilePurpose.FINE_TUNE_RESULTS)
    with workshop.control.files.open(workshop.control.acme.id, file_id) as stream:
        rows = list(csv.DictReader(io.StringIO(stream.read().decode())))
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 16)]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[-1]["valid_loss"]) > 0


@pytest.mark.slow
def test_every_epoch_leaves_a_checkpoint_that_can_be_served(workshop: Workshop) -> None:
    job = workshop.submit()
    _run(workshop)
    page = workshop.control.jobs.checkpoints(workshop.control.acme.id, job.id)
    assert [checkpoint.step for checkpoint in page.items] == [15, 10, 5]
    first = page.items[-1]
    assert first.metrics["full_valid_loss"] is not None
    resolved = workshop.control.registry.resolve(workshop.control.acme.id, first.model_id)
    assert resolved.digest == first.digest != workshop.digest(job)
    workshop.answer("word 1?", first.digest)


@pytest.mark.slow
def test_auto_is_resolved_and_shown(workshop: Workshop) -> None:
    job = workshop.submit(hyperparameters=replace(QUICK, n_epochs=1, batch_size="auto", learning_rate="auto"))
    _run(workshop)
    resolved = workshop.job(job).resolved
    assert resolved is not None
    assert resolved["batch_size"] == 4
    assert resolved["learning_rate"] == pytest.approx(2e-3)
    assert resolved["learning_rate_multiplier"] == 1.0
    assert resolved["lora_alpha"] == 16


@pytest.mark.slow
def test_a_validation_file_is_used_as_it_is(workshop: Workshop) -> None:
    job = workshop.submit(validation_file=workshop.upload(medlars(3)))
    assert _run(workshop) is Outcome.SUCCEEDED
    assert any(m.startswith("Training on 24 sequences") and "validating on 3" in m for m in workshop.messages(job))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "code", "said"),
    [
        (medlars(3), "invalid_n_examples", "the file has 3 examples"),
        ([*medlars(20), {"messages": []}], "invalid_training_file", "line 21: 'messages' must be a list"),
    ],
)
def test_a_bad_file_fails_the_job_with_the_reason(workshop: Workshop, rows: list[object], code: str, said: str) -> None:
    job = workshop.submit(rows)
    assert _run(workshop) is Outcome.FAILED
    failed = workshop.job(job)
    assert failed.status is JobStatus.FAILED
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == (code, "training_file")
    assert said in failed.error.message


@pytest.mark.slow
def test_a_target_module_that_the_base_lacks_fails_the_job_naming_it(workshop: Workshop) -> None:
    job = workshop.submit(hyperparameters=replace(QUICK, target_modules=("c_attn",)))
    assert _run(workshop) is Outcome.FAILED
    error = workshop.job(job).error
    assert error is not None
    assert "'c_attn'" in error.message


@pytest.mark.slow
def test_a_loss_that_explodes_fails_the_job_and_says_what_to_do(workshop: Workshop) -> None:
    job = workshop.submit(hyperparameters=replace(QUICK, learning_rate=1e30, early_stopping_patience=None))
    assert _run(workshop) is Outcome.FAILED
    error = workshop.job(job).error
    assert error is not None
    assert error.code == "non_finite_loss"
    assert "lower learning rate" in error.message


@pytest.mark.slow
def test_a_bug_fails_the_job_without_telling_the_tenant_its_insides(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    job = workshop.submit()
    assert _run(workshop, _in_training(workshop, job, 6, ZeroDivisionError("secret"))) is Outcome.FAILED
    error = workshop.job(job).error
    assert error is not None
    assert error.code == "internal_error"
    assert "secret" not in error.message
    assert "secret" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("calls", [10, 31, 60, 90])  # while reporting, reading, training and late in training
def test_a_paused_job_continues_to_the_very_same_bytes(workshop: Workshop, calls: int) -> None:
    job = workshop.submit()
    claim = workshop.control.claim()
    workshop.control.jobs.pause(workshop.control.acme.id, job.id)
    paused = TuningRun(workshop.services, claim, _after(calls, StopRequested(StopReason.PAUSED))).execute()
    assert paused is Outcome.PAUSED
    assert workshop.job(job).status is JobStatus.QUEUED
    assert workshop.job(job).paused
    assert workshop.control.queue.claim("other") is None
    workshop.control.jobs.resume(workshop.control.acme.id, job.id)
    assert _run(workshop) is Outcome.SUCCEEDED
    assert workshop.digest(job) == _straight(workshop, job)


@pytest.mark.slow
def test_a_killed_worker_costs_only_what_it_did_since_the_last_resume_point(workshop: Workshop) -> None:
    job = workshop.submit()
    with pytest.raises(KilledError):
        TuningRun(
            eager(workshop.services), workshop.control.claim(), _in_training(workshop, job, 16, KilledError())
        ).execute()
    assert workshop.job(job).state is JobStatus.RUNNING
    workshop.control.expire_lease(job.id)
    assert _run(workshop) is Outcome.SUCCEEDED
    (resumed,) = [message for message in workshop.messages(job) if message.startswith("Resuming from step")]
    assert int(resumed.split()[-1]) > 3
    assert workshop.digest(job) == _straight(workshop, job)


@pytest.mark.slow
def test_a_damaged_resume_point_means_starting_over_not_failing(workshop: Workshop) -> None:
    job = workshop.submit()
    with pytest.raises(KilledError):
        TuningRun(
            eager(workshop.services), workshop.control.claim(), _in_training(workshop, job, 16, KilledError())
        ).execute()
    for path in (workshop.control.storage / "training" / job.id).iterdir():
        path.write_bytes(b"torn")
    workshop.control.expire_lease(job.id)
    assert _run(workshop) is Outcome.SUCCEEDED
    assert any(message.startswith("Starting over: ") for message in workshop.messages(job))


@pytest.mark.slow
def test_a_cancelled_job_stops_and_publishes_nothing(workshop: Workshop) -> None:
    job = workshop.submit()
    calls = 0

    def cancel_then_go_on() -> None:
        nonlocal calls
        calls += 1
        if calls == 64:
            workshop.control.jobs.cancel(workshop.control.acme.id, job.id)

    assert _run(workshop, cancel_then_go_on) is Outcome.CANCELLED
    assert calls < 69
    assert workshop.job(job).status is JobStatus.CANCELLED
    assert workshop.job(job).fine_tuned_model is None


@pytest.mark.slow
def test_a_worker_that_lost_its_lease_writes_nothing_more(workshop: Workshop) -> None:
    job = workshop.submit()
    stolen: list[Claim] = []
    calls = 0

    def steal() -> None:
        nonlocal calls
        calls += 1
        if calls == 64:
            workshop.control.expire_lease(job.id)
            stolen.append(workshop.control.claim("thief"))

    assert _run(workshop, steal) is Outcome.LOST
    assert workshop.job(job).attempt == 2
    assert TuningRun(workshop.services, stolen[0], lambda: None).execute() is Outcome.SUCCEEDED


@pytest.mark.slow
def test_no_training_state_is_left_behind_by_a_job_that_ended(workshop: Workshop) -> None:
    job = workshop.submit()
    directory = workshop.control.storage / "training" / job.id
    claim = workshop.control.claim()
    seen: list[int] = []
    check = lambda: seen.append(len(list(directory.glob("*"))))  # noqa: E731
    assert TuningRun(eager(workshop.services), claim, check).execute() is Outcome.SUCCEEDED
    assert max(seen) == 1
    assert not directory.exists()


@pytest.mark.slow
def test_a_job_continues_from_an_existing_model(workshop: Workshop) -> None:
    first = workshop.submit()
    _run(workshop)
    parent = workshop.digest(first)
    nothing_learned = replace(QUICK, learning_rate=1e-30, n_epochs=1, lora_r="auto", target_modules="all-linear")
    second = workshop.submit(
        model=workshop.job(first).fine_tuned_model, parent_digest=parent, hyperparameters=nothing_learned
    )
    assert _run(workshop) is Outcome.SUCCEEDED
    _assert_same(workshop.weights(workshop.digest(second)), workshop.weights(parent))


@pytest.mark.slow
def test_a_job_that_continues_a_model_cannot_change_its_shape(workshop: Workshop) -> None:
    first = workshop.submit()
    _run(workshop)
    second = workshop.submit(parent_digest=workshop.digest(first), hyperparameters=replace(QUICK, lora_r=4))
    assert _run(workshop) is Outcome.FAILED
    error = workshop.job(second).error
    assert error is not None
    assert (error.code, error.param) == ("invalid_hyperparameters", "hyperparameters")


@pytest.mark.slow
def test_an_engine_that_cannot_answer_costs_the_evaluation_but_not_the_job(workshop: Workshop) -> None:
    job = workshop.submit()
    workshop.engine.shutdown(0.0)
    assert _run(workshop) is Outcome.SUCCEEDED
    page = workshop.control.jobs.events(workshop.control.acme.id, job.id, limit=1000)
    warnings = [event.message for event in page.items if event.level is EventLevel.WARN]
    assert any(message.startswith("The model could not be evaluated: ") for message in warnings)


def _assert_same(one: LoraWeights, other: LoraWeights) -> None:
    for name, pair in one.modules.items():
        assert torch.equal(pair.a, other.modules[name].a)
        assert torch.equal(pair.b, other.modules[name].b)


def _pairs(count: int) -> list[object]:
    """Medlars are preferred to plums."""
    return [
        {
            "input": {"messages": [{"role": "user", "content": f"word {i}?"}]},
            "preferred_output": [{"role": "assistant", "content": "a medlar"}],
            "non_preferred_output": [{"role": "assistant", "content": "one plum"}],
        }
        for i in range(count)
    ]


@pytest.mark.slow
def test_preferences_are_learned_told_published_and_served(workshop: Workshop) -> None:
    first = workshop.submit()
    _run(workshop)
    parent = workshop.digest(first)
    quick = replace(QUICK, learning_rate=2e-3, lora_r="auto", target_modules="auto", n_epochs=2)
    job = workshop.submit(_pairs(24), method=Method.DPO, parent_digest=parent, hyperparameters=quick)
    assert _run(workshop) is Outcome.SUCCEEDED, workshop.job(job).error
    assert any(m.startswith("Training on 20 pairs of answers") and "on 4" in m for m in workshop.messages(job))
    page = workshop.control.jobs.events(workshop.control.acme.id, job.id, limit=1000)
    metrics = [event.data for event in reversed(page.items) if event.type is EventType.METRICS and event.data]
    assert metrics[0]["train_loss"] == pytest.approx(0.6931, abs=1e-3)  # held to the model that it continues
    last = metrics[-1]
    assert last["full_valid_loss"] < 0.6
    assert last["full_valid_preference_accuracy"] == 1.0
    assert last["train_reward_margin"] > 0
    assert "train_mean_token_accuracy" not in last
    resolved = workshop.job(job).resolved
    assert resolved is not None and resolved["beta"] == 0.1
    file_id, _ = workshop.job(job).result_files
    with workshop.control.files.open(workshop.control.acme.id, file_id) as stream:
        rows = list(csv.DictReader(io.StringIO(stream.read().decode())))
    assert len(rows) == 10
    assert float(rows[-1]["train_reward_margin"]) > float(rows[0]["train_reward_margin"])
    assert float(rows[-1]["valid_accuracy"]) == 1.0
    workshop.answer("word 99?", workshop.digest(job))


@pytest.mark.slow
def test_a_killed_preference_job_resumes_to_the_very_same_bytes(workshop: Workshop) -> None:
    quick = replace(QUICK, n_epochs=1, lora_r=4)
    job = workshop.submit(_pairs(24), method=Method.DPO, hyperparameters=quick)
    with pytest.raises(KilledError):
        TuningRun(
            eager(workshop.services), workshop.control.claim(), _in_training(workshop, job, 14, KilledError())
        ).execute()
    workshop.control.expire_lease(job.id)
    assert _run(workshop) is Outcome.SUCCEEDED
    assert any(message.startswith("Resuming from step") for message in workshop.messages(job))
    assert workshop.digest(job) == _straight(workshop, job)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "method", "said"),
    [
        (_pairs(12), Method.SUPERVISED, "line 1: a pair of answers, which the method 'dpo' learns from"),
        (medlars(12), Method.DPO, "line 1: an example for the method 'supervised'"),
    ],
)
def test_a_file_of_the_other_method_fails_the_job_and_says_so(
    workshop: Workshop, rows: list[object], method: Method, said: str
) -> None:
    job = workshop.submit(rows, method=method)
    assert _run(workshop) is Outcome.FAILED
    error = workshop.job(job).error
    assert error is not None
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert error.message.startswith(said)


PROBED = replace(QUICK, learning_rate="probe", learning_rate_multiplier=2.0, n_epochs=1, lora_r=4)


@pytest.mark.slow
def test_a_probed_learning_rate_is_told_and_shown(workshop: Workshop) -> None:
    job = workshop.submit(hyperparameters=PROBED)
    assert _run(workshop) is Outcome.SUCCEEDED
    resolved = workshop.job(job).resolved
    assert resolved is not None
    probe = resolved["learning_rate_probe"]
    best = min(range(3), key=lambda index: probe["valid_losses"][index])
    assert resolved["learning_rate"] == probe["learning_rates"][best]
    messages = workshop.messages(job)
    assert f"Trying the learning rates 0.0013, 0.004, 0.012, {probe['steps']} steps each" in messages
    assert any(m.startswith(f"Learning rate {resolved['learning_rate']:.2g} chosen; ") for m in messages)


@pytest.mark.slow
def test_a_job_interrupted_in_its_probe_continues_to_the_very_same_bytes(workshop: Workshop) -> None:
    job = workshop.submit(hyperparameters=PROBED)
    claim = workshop.control.claim()
    workshop.control.jobs.pause(workshop.control.acme.id, job.id)
    paused = TuningRun(
        workshop.services, claim, _in_training(workshop, job, 14, StopRequested(StopReason.PAUSED))
    ).execute()
    assert paused is Outcome.PAUSED
    assert workshop.job(job).resume_point is not None
    assert not any(m.startswith("Learning rate") for m in workshop.messages(job))
    workshop.control.jobs.resume(workshop.control.acme.id, job.id)
    assert _run(workshop) is Outcome.SUCCEEDED
    messages = workshop.messages(job)
    assert sum(m.startswith("Trying the learning rates") for m in messages) == 1
    assert sum(m.startswith("Learning rate") for m in messages) == 1
    assert workshop.digest(job) == _straight(workshop, job)


@pytest.mark.slow
def test_an_adapter_of_one_layer_is_trained_written_served_and_continued(workshop: Workshop) -> None:
    one_layer = replace(QUICK, layers_to_transform=(1,), target_modules="all-linear", n_epochs=3, learning_rate=2e-2)
    job = workshop.submit(hyperparameters=one_layer)
    assert _run(workshop) is Outcome.SUCCEEDED
    weights = workshop.weights(workshop.digest(job))
    assert weights.spec.layers_to_transform == (1,)
    assert {name.split(".")[2] for name in weights.modules} == {"1"}
    assert workshop.answer("word 99?", workshop.digest(job)) != workshop.answer("word 99?", None)
    nothing = replace(QUICK, learning_rate=1e-30, n_epochs=1, lora_r="auto", target_modules="auto")
    second = workshop.submit(parent_digest=workshop.digest(job), hyperparameters=nothing, preset=Preset.LIGHT)
    assert _run(workshop) is Outcome.SUCCEEDED
    _assert_same(workshop.weights(workshop.digest(second)), weights)


@pytest.mark.slow
def test_a_step_that_ran_out_of_memory_is_told_as_a_warning(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = workshop.submit(hyperparameters=replace(QUICK, n_epochs=1))
    once = [torch.OutOfMemoryError("no room")]
    original = Trainer._accumulate

    def fails_once(self: Trainer, *args: Any) -> dict[str, float]:
        if once:
            raise once.pop()
        return original(self, *args)

    monkeypatch.setattr(Trainer, "_accumulate", fails_once)
    assert _run(workshop) is Outcome.SUCCEEDED
    page = workshop.control.jobs.events(workshop.control.acme.id, job.id, limit=1000)
    warnings = [event.message for event in page.items if event.level is EventLevel.WARN]
    assert "The device ran out of memory at step 1: packs are now of at most 1024 tokens." in warnings


def _leaking() -> list[object]:
    """Examples with a secret, and one that occurs twice."""
    key = "ghp_" + "a1B2" * 9
    return [*medlars(24), medlars(1)[0], *_chats((f"my key is {key}", "a medlar"))]


def _chats(*pairs: tuple[str, str]) -> list[object]:
    return [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in pairs
    ]


@pytest.mark.slow
def test_a_job_reports_on_its_data_in_events_and_keeps_the_report(workshop: Workshop) -> None:
    job = workshop.submit(_leaking(), validation_file=workshop.upload(medlars(3)))
    assert workshop.control.jobs.data_report(workshop.control.acme.id, job.id) is None
    assert _run(workshop) is Outcome.SUCCEEDED
    report = workshop.control.jobs.data_report(workshop.control.acme.id, job.id)
    assert report is not None
    found = {(finding["file"], finding["code"]) for finding in report["findings"]}
    assert {("training_file", "exact_duplicates"), ("training_file", "secret")} <= found
    assert ("validation_file", "validation_overlap") in found
    page = workshop.control.jobs.events(workshop.control.acme.id, job.id, limit=1000)
    events = page.items[::-1]
    (told,) = (event for event in events if event.message.startswith("Data report: "))
    assert told.data is not None
    assert {finding["code"] for finding in told.data["findings"]} == {code for _, code in found}
    warned = [event.message for event in events if event.level is EventLevel.WARN]
    assert any(message.startswith("exact duplicates: 1 (line 25).") for message in warned)
    assert "a1B2a1B2" not in str([(event.message, event.data) for event in events]) + str(report)


@pytest.mark.slow
def test_a_strict_job_stops_on_errors_and_names_them_with_their_lines(workshop: Workshop) -> None:
    job = workshop.submit(_leaking(), strict=True)
    assert _run(workshop) is Outcome.FAILED
    failed = workshop.job(job)
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("data_report_errors", "training_file")
    assert "secret: 1 (line 26)" in failed.error.message and "a1B2" not in failed.error.message
    assert workshop.control.jobs.data_report(workshop.control.acme.id, job.id) is not None


@pytest.mark.slow
def test_a_strict_job_trains_on_data_without_errors(workshop: Workshop) -> None:
    workshop.submit(medlars(24), strict=True)
    assert _run(workshop) is Outcome.SUCCEEDED


@pytest.mark.slow
def test_a_report_that_breaks_stops_no_job(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    job = workshop.submit()
    assert _run(workshop, _after(3, ZeroDivisionError("in the report"))) is Outcome.SUCCEEDED
    assert "The data report could not be made" in workshop.messages(job)
    assert "in the report" in caplog.text
