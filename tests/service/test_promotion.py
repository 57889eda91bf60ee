"""The gate and the alias in the transaction that ends a job, on SQLite and Postgres."""

from __future__ import annotations

from adapters.gate import GatePolicy, GateVerdict
from service.job import EventLevel, GateDecision
from tests.service.control_fixtures import Control, control, database, database_url, postgres_server, postgres_url

__all__ = ["control", "database", "database_url", "postgres_server", "postgres_url"]

PASSED = GateVerdict(True, (), True)
FAILED = GateVerdict(False, ("against the base alone: accuracy +0.010",), False)


def _succeed(control: Control, decision: GateDecision, gate: GatePolicy | None = None) -> str:
    control.create_job(alias="best", gate=gate or GatePolicy())
    return control.queue.succeed(
        control.claim(),
        digest="d" * 64,
        base_fingerprint="fingerprint-of-tiny",
        metrics={"evaluation": {"task": "labels"}},
        trained_tokens=1,
        gate=decision,
    )


def _active(control: Control) -> str:
    return control.registry.aliases.get(control.acme.id, "best").model


def test_a_verdict_for_it_moves_the_alias_and_is_kept_with_the_version(control: Control) -> None:
    first = control.publish(alias="best")
    second = _succeed(control, GateDecision(PASSED, compared_with=first))
    assert _active(control) == second
    gate = control.registry.version(control.acme.id, second).metrics["evaluation"]["gate"]
    assert (gate["passed"], gate["alias"], gate["alias_moved"], gate["compared_with"]) == (True, "best", True, first)
    assert gate["policy"] == GatePolicy().as_dict()


def test_a_verdict_against_it_leaves_the_alias_and_says_why(control: Control) -> None:
    first = control.publish(alias="best")
    second = _succeed(control, GateDecision(FAILED, compared_with=first))
    assert _active(control) == first
    version = control.registry.version(control.acme.id, second)
    assert version.metrics["evaluation"]["task"] == "labels", "the version is published all the same"
    assert version.metrics["evaluation"]["gate"]["reasons"] == list(FAILED.reasons)
    assert version.job_id is not None
    events = control.jobs.events(control.acme.id, version.job_id).items
    (told,) = [event for event in events if event.level is EventLevel.WARN]
    assert told.message == f"Gate not passed, alias 'best' stays where it is: {FAILED.reasons[0]}"


def test_an_alias_that_was_moved_meanwhile_stays_there(control: Control) -> None:
    first = control.publish(alias="best", digest="a" * 64)
    other = control.publish(digest="b" * 64)
    control.registry.aliases.set(control.acme.id, "best", other)
    third = _succeed(control, GateDecision(PASSED, compared_with=first))
    assert _active(control) == other
    gate = control.registry.version(control.acme.id, third).metrics["evaluation"]["gate"]
    assert gate["passed"] is False
    assert gate["reasons"] == [f"alias 'best' was moved to {other} after the comparison"]


def test_an_alias_that_was_made_meanwhile_stays_there(control: Control) -> None:
    other = control.publish()
    control.registry.aliases.set(control.acme.id, "best", other)
    _succeed(control, GateDecision(PASSED, compared_with=None))
    assert _active(control) == other


def test_with_the_gate_off_the_alias_moves_wherever_it_was(control: Control) -> None:
    control.publish(alias="best")
    model = _succeed(control, GateDecision(PASSED, compared_with=None), gate=GatePolicy(enabled=False))
    assert _active(control) == model


def test_without_an_alias_the_verdict_is_told_and_moves_nothing(control: Control) -> None:
    job = control.create_job()
    control.queue.succeed(
        control.claim(),
        digest="d" * 64,
        base_fingerprint="f",
        metrics={},
        trained_tokens=1,
        gate=GateDecision(FAILED, compared_with=None),
    )
    events = control.jobs.events(control.acme.id, job.id).items
    (told,) = [event for event in events if event.message.startswith("Gate")]
    assert told.level is EventLevel.INFO
    assert told.data is not None and told.data["alias_moved"] is False
    assert control.registry.aliases.list(control.acme.id) == []
