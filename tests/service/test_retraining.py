"""Proposals to retrain, from their trigger to the job: on SQLite and Postgres, through repetitions and crashes."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa

from adapters.data_report import Finding, Severity
from service.drift_states import DriftState
from service.errors import ConflictError, InvalidRequestError, NotFoundError, UnavailableError
from service.job import EvaluationSpec, JobStatus
from service.retraining_data import RetrainingFiles, _line
from service.retraining_rows import ProposalState, RetrainingOptions, Trigger
from service.retraining_worker import MAX_ATTEMPTS, RetrainingWorker
from service.tables import feedback, jobs, retraining_proposals
from service.tenant_settings import RetrainingPolicy
from tests.service.control_fixtures import control, database, database_url, postgres_server, postgres_url
from tests.service.retraining_fixtures import Practice, practice

__all__ = ["control", "database", "database_url", "postgres_server", "postgres_url", "practice"]


class KilledError(BaseException):
    """The process is gone."""


def proposed(practice: Practice, corrections: int = 12, **options: object) -> str:
    """A proposal for the alias `best` that is ready; its id."""
    practice.consent()
    practice.publish()
    practice.correct(corrections, alias="best")
    practice.retraining.request(practice.tenant, "best", RetrainingOptions(**options))  # type: ignore[arg-type]
    practice.worker.work()
    assert state(practice) is ProposalState.PROPOSED
    return practice.proposal.id


def made_files(practice: Practice) -> list[str]:
    """The names of the files that proposals made, without their ids."""
    names = (file.filename for file in practice.control.files.list(practice.tenant).items)
    return sorted(name.split("-")[-1] for name in names if name.startswith("retraining-"))


BOTH = ["train.jsonl", "validation.jsonl"]


def state(practice: Practice) -> ProposalState:
    """Of the newest proposal."""
    return practice.proposal.state


def num_jobs(practice: Practice) -> int:
    return len(practice.control.jobs.list(practice.tenant, limit=100).items)


@pytest.mark.slow
def test_drift_leads_to_a_proposal_with_files_report_and_estimate(practice: Practice) -> None:
    practice.consent()
    model = practice.publish()
    practice.correct(20, alias="best")
    practice.judge(practice.answer("a pear", alias="best"), rating=1.0)
    practice.judge(practice.answer("a bad pear", alias="best"), rating=0.2)
    practice.drift(model)
    practice.worker.work()
    found = practice.proposal
    assert (found.state, found.trigger, found.alias, found.model) == (
        ProposalState.PROPOSED,
        Trigger.DRIFT,
        "best",
        model,
    )
    assert found.reason == "The signal 'prompt_embedding' has drifted (0.4, threshold 0.2, 321 samples)."
    assert found.report is not None and found.report["statistics"]["training"]["examples"] > 40
    assert found.estimate is not None and found.estimate["seconds"] == 4.0
    assert found.counts is not None
    counts = {name: found.counts[name] for name in ("corrected", "rated", "original", "replaced")}
    assert counts == {"corrected": 20, "rated": 1, "original": 36, "replaced": 0}
    train, held_out = practice.rows(found.training_file), practice.rows(found.validation_file)
    assert len(held_out) == found.counts["held_out"] and len(train) + len(held_out) == 20 + 1 + 40
    assert "a bad pear" not in str(train) + str(held_out)
    assert {"messages": [{"role": "user", "content": "word 3?"}, {"role": "assistant", "content": "a quince"}]} in (
        train + held_out
    )
    assert made_files(practice) == BOTH
    assert practice.moved == [("drift", "proposed")]


def test_the_same_trigger_again_is_noted_and_opens_nothing(practice: Practice) -> None:
    practice.consent()
    model = practice.publish()
    for _ in range(3):
        practice.drift(model)
        practice.drift("best", signal="prompt_length")
        practice.worker.work()
    assert len(practice.proposals()) == 1
    said = practice.messages(practice.proposal)
    assert sum("'prompt_embedding' has drifted" in message for message in said) >= 1
    assert sum("'prompt_length' has drifted" in message for message in said) >= 1
    practice.drift(model, state=DriftState.OK, previous=DriftState.DRIFT)
    assert practice.messages(practice.proposal)[-1] == "The signal 'prompt_embedding' is in state 'ok' again."
    practice.drift(model, state=DriftState.INSUFFICIENT_DATA, previous=DriftState.OK)
    practice.drift("ft:gone")
    assert len(practice.proposals()) == 1


def test_many_triggers_at_once_open_one_proposal(practice: Practice) -> None:
    model = practice.publish()
    threads = [threading.Thread(target=practice.drift, args=(model,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(practice.proposals()) == 1


@pytest.mark.slow
def test_what_is_missing_is_said_and_the_proposal_goes_on_when_it_has_come(practice: Practice) -> None:
    model = practice.publish()
    practice.drift(model)
    practice.worker.work()
    assert practice.proposal.missing is not None and "'capture'" in practice.proposal.missing
    practice.consent()
    practice.correct(9, alias="best")
    practice.worker.work()
    practice.drift(model)
    assert state(practice) is ProposalState.INSUFFICIENT
    practice.correct(1, alias="best", prompt="word 2?")
    practice.worker.work()
    missing = practice.proposal.missing
    assert missing is not None and missing.startswith("9 of at least 10 corrected answers"), "two are of one prompt"
    with pytest.raises(ConflictError, match="9 of at least 10") as refused:
        practice.retraining.approve(practice.tenant, practice.proposal.id)
    assert refused.value.code == "not_enough_feedback"
    revision = practice.proposal.revision
    practice.worker.work()
    assert practice.proposal.revision == revision, "the same corrections are not looked at again"
    practice.correct(1, alias="best")
    practice.worker.work()
    assert state(practice) is ProposalState.PROPOSED and len(practice.proposals()) == 1


@pytest.mark.slow
def test_falling_quality_leads_to_a_proposal_once(practice: Practice) -> None:
    practice.consent()
    model = practice.publish()
    for _ in range(100):
        practice.judge(practice.answer(model=model, captured=False), label="a medlar")
    practice.correct(40, model=model)
    practice.worker.work()
    found = practice.proposal
    assert (found.trigger, found.state) == (Trigger.QUALITY, ProposalState.PROPOSED)
    assert found.reason.startswith("Accuracy fell from 1.000")
    practice.retraining.dismiss(practice.tenant, found.id)
    practice.worker.work()
    assert [p.state for p in practice.proposals()] == [ProposalState.DISMISSED]


@pytest.mark.slow
def test_the_job_goes_on_from_the_model_and_follows_its_alias(practice: Practice) -> None:
    proposal_id = proposed(practice)
    started = practice.retraining.approve(practice.tenant, proposal_id)
    assert practice.retraining.approve(practice.tenant, proposal_id) == started
    assert started.job_id is not None and num_jobs(practice) == 2
    spec = practice.control.jobs.get(practice.tenant, started.job_id).spec
    version = practice.control.registry.version(practice.tenant, "best")
    assert (spec.model, spec.parent_digest, spec.alias) == (version.id, version.digest, "best")
    assert (spec.training_file, spec.validation_file) == (started.training_file, started.validation_file)
    assert (spec.seed, spec.suffix, spec.metadata) == (started.seed, "fruit", {"retraining": proposal_id})
    assert spec.evaluation == EvaluationSpec() and practice.estimates.asked[-1] == spec
    running = practice.retraining.outcome(started)
    assert running is not None and running.alias_moved is None
    practice.control.finish(practice.control.claim(), "e" * 64)
    done = practice.retraining.outcome(started)
    assert done is not None and done.alias_moved is True and done.job.status is JobStatus.SUCCEEDED
    assert practice.control.registry.version(practice.tenant, "best").digest == "e" * 64


@pytest.mark.slow
def test_the_next_retraining_wants_new_corrections_and_takes_the_first_files_along(practice: Practice) -> None:
    """The original is what a person uploaded, however many retrainings lie between."""
    practice.retraining.approve(practice.tenant, proposed(practice))
    practice.control.finish(practice.control.claim(), "e" * 64)
    practice.drift("best")
    practice.worker.work()
    missing = practice.proposal.missing
    assert missing is not None and "0 of at least 10" in missing and "12 more are known to the model already" in missing
    practice.correct(11, alias="best")
    practice.worker.work()
    again, before = practice.proposal, practice.proposals()[0]
    assert again.state is ProposalState.PROPOSED and again.original_job == before.original_job
    assert again.counts is not None
    assert (again.counts["corrected"], again.counts["new_corrected"], again.counts["original"]) == (23, 11, 36)
    held = [row for row in practice.rows(before.validation_file) if "word" in str(row)]
    assert all(row in practice.rows(again.validation_file) for row in held), "what was held out is never learned"


@pytest.mark.slow
def test_a_correction_replaces_an_original_example_and_older_ones_of_the_same_prompt(practice: Practice) -> None:
    practice.consent()
    practice.publish(alias="best")
    practice.correct(10, alias="best")
    for text in ("an apple", "a cherry"):
        practice.judge(practice.answer(alias="best", prompt="old 7?"), corrected=text)
    practice.judge(practice.answer("a well-rated pear", alias="best", prompt="old 7?"), rating=1.0)
    practice.retraining.request(practice.tenant, "best", RetrainingOptions())
    practice.worker.work()
    found = practice.proposal
    rows = practice.rows(found.training_file) + practice.rows(found.validation_file)
    (row,) = [row for row in rows if "old 7?" in str(row)]
    assert "a cherry" in str(row)
    assert found.counts is not None and found.counts["repeated"] == 2


def test_earlier_answers_of_a_conversation_are_not_learned() -> None:
    prompt = {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant", "user")]}
    assert b'"assistant", "weight": 0}' in _line(prompt, "good") and _line(prompt, "good").endswith(b'"good"}]}')
    assert _line({"prompt": "once"}, "upon") == b'{"prompt": "once", "completion": "upon"}'


def test_without_the_original_only_fresh_examples_are_learned(practice: Practice) -> None:
    proposed(practice, include_original=False, min_rating=None)
    counts = practice.proposal.counts
    assert counts is not None and counts["original"] == 0
    assert "old" not in str(practice.rows(practice.proposal.training_file))


@pytest.mark.slow
def test_an_original_that_was_deleted_is_left_out(practice: Practice) -> None:
    practice.consent()
    practice.publish()
    for file in practice.control.files.list(practice.tenant).items:
        practice.control.files.delete(practice.tenant, file.id)
    practice.correct(12, alias="best")
    practice.drift("best")
    practice.worker.work()
    assert state(practice) is ProposalState.PROPOSED
    assert practice.proposal.counts is not None and practice.proposal.counts["original"] == 0


@pytest.mark.slow
def test_never_two_at_a_time(practice: Practice) -> None:
    practice.retraining.approve(practice.tenant, proposed(practice))
    practice.drift("best")
    with pytest.raises(ConflictError) as refused:
        practice.retraining.request(practice.tenant, "best", RetrainingOptions())
    assert refused.value.code == "retraining_running"
    assert len(practice.proposals()) == 1 and "has drifted" in practice.messages(practice.proposal)[-1]


def test_approved_by_many_at_once_there_is_one_job(practice: Practice) -> None:
    proposal_id = proposed(practice)
    outcomes: list[str] = []

    def approve() -> None:
        try:
            outcomes.append(str(practice.retraining.approve(practice.tenant, proposal_id).job_id))
        except ConflictError:
            outcomes.append("conflict")

    threads = [threading.Thread(target=approve) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert num_jobs(practice) == 2 and len({o for o in outcomes if o != "conflict"}) == 1


@pytest.mark.slow
def test_auto_starts_at_once_then_waits_for_the_cooldown(practice: Practice) -> None:
    control = practice.control
    practice.consent(retraining=RetrainingPolicy.AUTO)
    practice.publish()
    practice.correct(12, alias="best")
    practice.drift("best")
    practice.worker.work()
    assert state(practice) is ProposalState.STARTED
    assert "Started by the tenant's policy 'auto'." in practice.messages(practice.proposal)[-1]
    control.finish(control.claim(), "e" * 64)
    practice.correct(12, alias="best")
    practice.drift("best")
    practice.worker.work()
    assert state(practice) is ProposalState.PROPOSED and num_jobs(practice) == 2
    with control.database.begin() as connection:
        is_first = retraining_proposals.c.job_id.is_not(None)
        connection.execute(retraining_proposals.update().where(is_first).values(started_at=1.0))
    practice.worker.work()
    assert state(practice) is ProposalState.STARTED and num_jobs(practice) == 3
    assert practice.moved.count(("drift", "started")) == 2


def test_auto_starts_nothing_while_the_data_report_has_errors(practice: Practice) -> None:
    practice.reports.findings = (Finding("secret", Severity.ERROR, "training_file", 1, "Remove it."),)
    practice.consent(retraining=RetrainingPolicy.AUTO)
    practice.publish()
    practice.correct(12, alias="best")
    practice.drift("best")
    practice.worker.work()
    assert state(practice) is ProposalState.PROPOSED and num_jobs(practice) == 1
    assert practice.messages(practice.proposal)[-1].startswith("The data report has errors")
    assert practice.retraining.approve(practice.tenant, practice.proposal.id).job_id is not None


def test_the_policy_off_proposes_nothing_unless_asked(practice: Practice) -> None:
    practice.consent(retraining=RetrainingPolicy.OFF)
    practice.publish()
    practice.drift("best")
    practice.worker.work()
    assert practice.proposals() == []
    practice.retraining.request(practice.tenant, "best", RetrainingOptions())
    assert len(practice.proposals()) == 1


def test_a_wish_without_capture_or_model_is_refused(practice: Practice) -> None:
    practice.publish()
    with pytest.raises(InvalidRequestError, match="'capture'"):
        practice.retraining.request(practice.tenant, "best", RetrainingOptions())
    with pytest.raises(NotFoundError):
        practice.retraining.request(practice.control.zenith.id, "best", RetrainingOptions())


@pytest.mark.slow
def test_dismissed_it_ends_and_its_files_go(practice: Practice) -> None:
    proposal_id = proposed(practice)
    files = practice.proposal.training_file
    assert practice.retraining.dismiss(practice.tenant, proposal_id).state is ProposalState.DISMISSED
    assert practice.retraining.dismiss(practice.tenant, proposal_id).state is ProposalState.DISMISSED
    with pytest.raises(NotFoundError):
        practice.control.files.get(practice.tenant, str(files))
    with pytest.raises(ConflictError) as refused:
        practice.retraining.approve(practice.tenant, proposal_id)
    assert refused.value.code == "invalid_retraining_state"
    practice.drift("best")
    assert practice.proposal.id != proposal_id, "a later trigger opens another"


def test_an_alias_that_moved_leaves_the_old_proposal_behind(practice: Practice) -> None:
    proposal_id = proposed(practice)
    practice.publish(digest="f" * 64)
    practice.drift("best")
    old, new = practice.proposals()
    assert (old.id, old.state) == (proposal_id, ProposalState.DISMISSED)
    assert (
        new.state is ProposalState.COLLECTING
        and new.model == practice.control.registry.version(practice.tenant, "best").id
    )


@pytest.mark.parametrize("place", ["_publish", "_report", "_move", "build"])
def test_after_a_crash_between_any_two_steps_it_goes_on(
    practice: Practice, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    practice.consent()
    practice.publish()
    practice.correct(12, alias="best")
    practice.drift("best")

    def die(*_: object, **__: object) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(RetrainingFiles if place == "build" else RetrainingWorker, place, die)
        with pytest.raises(KilledError):
            practice.worker.work()
    practice.worker.work()
    assert state(practice) is ProposalState.PROPOSED and len(practice.proposals()) == 1
    assert made_files(practice) == BOTH


def test_a_crash_while_approving_leaves_no_job_or_its_one_job(
    practice: Practice, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposal_id = proposed(practice)

    def die(*_: object, **__: object) -> bool:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr("service.retraining.move", die)
        with pytest.raises(KilledError):
            practice.retraining.approve(practice.tenant, proposal_id)
    assert num_jobs(practice) == 1 and state(practice) is ProposalState.PROPOSED
    practice.retraining.approve(practice.tenant, proposal_id)
    assert num_jobs(practice) == 2


def test_what_takes_the_process_down_each_time_is_given_up(practice: Practice, monkeypatch: pytest.MonkeyPatch) -> None:
    practice.consent()
    practice.publish()
    practice.correct(12, alias="best")
    practice.drift("best")

    def die(*_: object, **__: object) -> None:
        raise KilledError

    monkeypatch.setattr(RetrainingFiles, "build", die)
    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(KilledError):
            practice.worker.work()
    practice.worker.work()
    assert state(practice) is ProposalState.FAILED
    assert practice.proposal.error is not None and practice.proposal.error["code"] == "internal_error"


def test_trouble_that_passes_postpones_and_a_hopeless_job_fails(
    practice: Practice, monkeypatch: pytest.MonkeyPatch
) -> None:
    practice.consent()
    practice.publish()
    practice.correct(12, alias="best")
    practice.drift("best")

    def busy(*_: object) -> None:
        raise UnavailableError("Too many estimates are being made.")

    def hopeless(*_: object) -> None:
        raise InvalidRequestError("lora_r 999 is over the limit", code="invalid_value")

    with monkeypatch.context() as patched:
        patched.setattr(practice.estimates, "make", busy)
        practice.worker.work()
    assert state(practice) is ProposalState.CHECKING
    monkeypatch.setattr(practice.estimates, "make", hopeless)
    practice.worker.work()
    assert practice.proposal.error == {"code": "invalid_value", "message": "lora_r 999 is over the limit"}


def test_two_services_on_one_database_make_one_proposal(practice: Practice) -> None:
    practice.consent()
    practice.publish()
    practice.correct(12, alias="best")
    practice.drift("best")
    threads = [threading.Thread(target=practice.worker.work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    practice.worker.work()
    assert state(practice) is ProposalState.PROPOSED
    assert made_files(practice) == BOTH, "nothing of those who came second is left"


@pytest.mark.slow
def test_texts_forgotten_while_they_are_collected_are_not_published(
    practice: Practice, monkeypatch: pytest.MonkeyPatch
) -> None:
    practice.consent()
    practice.publish()
    practice.correct(12, alias="best")
    practice.correct(3, alias="best", user="ada")
    practice.drift("best")
    build = RetrainingFiles.build

    def forgetful(self: RetrainingFiles, *arguments: object) -> object:
        built = build(self, *arguments)  # type: ignore[arg-type]
        practice.settings.forget(practice.tenant, "ada")
        return built

    with monkeypatch.context() as patched:
        patched.setattr(RetrainingFiles, "build", forgetful)
        practice.worker.work()
    assert state(practice) is ProposalState.COLLECTING
    practice.worker.work()
    assert practice.proposal.counts is not None and practice.proposal.counts["corrected"] == 12


def test_files_whose_time_is_up_are_made_again_from_what_is_left(practice: Practice) -> None:
    proposed(practice)
    before = practice.proposal.training_file
    practice.control.files.delete(practice.tenant, str(before))
    practice.worker.work()
    practice.worker.work()
    assert state(practice) is ProposalState.PROPOSED and practice.proposal.training_file != before
    practice.settings.change(practice.tenant, capture=False)
    practice.worker.work()
    assert state(practice) is ProposalState.INSUFFICIENT and practice.proposal.training_file is None
    assert made_files(practice) == []


def test_a_deleted_tenants_proposals_and_feedback_are_gone(practice: Practice) -> None:
    proposed(practice)
    practice.control.tenants.delete(practice.tenant)
    with practice.control.database.read() as connection:
        for table in (retraining_proposals, feedback, jobs):
            assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar() == 0
    practice.drift("best")
    practice.worker.work()
