"""Canaries, shadows and promotion in the database, on SQLite and Postgres: who ends them, what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from service.aliases import MoveKind
from service.canaries import Canaries
from service.database import connect
from service.errors import ConflictError, InvalidRequestError, NotFoundError, ServiceError
from service.experiment import Arm, CanaryPolicy, Experiment, ExperimentKind, Measure, Outcome
from service.registry import Registry
from service.routing import Route
from service.traffic_log import Retention, TrafficLog
from tests.service.control_fixtures import BASE, Control

CANARY, SHADOW = ExperimentKind.CANARY, ExperimentKind.SHADOW
POLICY = CanaryPolicy()


@pytest.fixture
def canaries(control: Control) -> Canaries:
    return Canaries(control.database, control.registry)


@pytest.fixture
def traffic(control: Control, canaries: Canaries) -> Iterator[TrafficLog]:
    log = TrafficLog(control.database, Retention(), judge=canaries.judge, on_dropped=pytest.fail)
    yield log
    log.stop()


@pytest.fixture
def models(control: Control) -> tuple[str, str]:
    """What the alias `best` points at, and a candidate."""
    return control.publish(alias="best", digest="a" * 64), control.publish(digest="b" * 64)


def route(control: Control, user: str, name: str = "best") -> Route:
    return control.registry.route(control.acme.id, name, lambda: user)


def ended(canaries: Canaries, control: Control) -> Experiment:
    """The newest experiment of the alias."""
    return canaries.list(control.acme.id, "best", after=None, limit=1).items[0]


def observe(traffic: TrafficLog, experiment: Experiment, arm: Arm, measure: Measure, *values: float) -> None:
    for value in values:
        traffic.observed(experiment.tenant_id, experiment.id, {(arm, measure): value})


@pytest.mark.slow
def test_a_share_of_the_users_gets_the_canary_and_every_user_stays_on_one_side(
    control: Control, canaries: Canaries, models: tuple[str, str]
) -> None:
    stable, candidate = models
    assert route(control, "u").trial is None and route(control, "u").alias == "best"
    canaries.set_canary(control.acme.id, "best", candidate, 30.0, POLICY)
    users = [f"user-{number}" for number in range(200)]
    few = {user for user in users if route(control, user).model.id == candidate}
    assert 30 <= len(few) <= 90
    for user in users[:20]:
        found = route(control, user)
        assert found.trial is not None
        assert found.trial.arm is (Arm.CANARY if user in few else Arm.STABLE)
        assert found.model.digest == ("b" if user in few else "a") * 64
    canaries.set_canary(control.acme.id, "best", candidate, 60.0, POLICY)
    more = {user for user in users if route(control, user).model.id == candidate}
    assert few < more
    assert route(control, "u", stable).trial is None, "who asks for the version itself is in no experiment"
    assert control.registry.resolve(control.acme.id, "best").id == stable


def test_promotion_moves_the_alias_and_ends_the_canary(
    control: Control, canaries: Canaries, models: tuple[str, str]
) -> None:
    canaries.set_canary(control.acme.id, "best", models[1], 10.0, POLICY)
    alias = canaries.promote(control.acme.id, "best", None)
    assert (alias.model, alias.history[0].kind) == (models[1], MoveKind.PROMOTED)
    assert ended(canaries, control).outcome is Outcome.PROMOTED
    with pytest.raises(ConflictError) as caught:
        canaries.promote(control.acme.id, "best", None)
    assert caught.value.code == "no_canary"
    assert control.registry.aliases.roll_back(control.acme.id, "best").model == models[0]
    assert canaries.promote(control.acme.id, "best", models[1]).model == models[1]


def test_any_move_of_the_alias_supersedes_what_runs_on_it(
    control: Control, canaries: Canaries, models: tuple[str, str]
) -> None:
    acme, other = control.acme.id, control.publish(digest="c" * 64)

    def start() -> None:
        canaries.set_canary(acme, "best", models[1], 10.0, POLICY)
        canaries.set_shadow(acme, "best", models[1], 10.0)

    for move in (
        lambda: control.publish(alias="best", digest="d" * 64),
        lambda: control.registry.aliases.roll_back(acme, "best"),
        lambda: control.registry.aliases.set(acme, "best", other),
        lambda: canaries.promote(acme, "best", models[0]),
    ):
        start()
        move()
        newest = canaries.list(acme, "best", after=None, limit=2).items
        assert [experiment.outcome for experiment in newest] == [Outcome.SUPERSEDED] * 2
        assert newest[0].reason is not None and "The alias moved to" in newest[0].reason
        found = route(control, "u")
        assert found.trial is None and found.shadow is None
    start()
    control.registry.aliases.set(acme, "best", control.registry.resolve(acme, "best").id)
    assert canaries.running(acme, "best", CANARY).is_running, "setting what is set is no move"
    control.registry.aliases.delete(acme, "best")
    assert ended(canaries, control).outcome is Outcome.ALIAS_DELETED
    assert len(canaries.list(acme, "best", after=None, limit=100).items) == 10, "ended experiments are kept"


def test_a_model_on_trial_cannot_be_deleted(control: Control, canaries: Canaries, models: tuple[str, str]) -> None:
    acme = control.acme.id
    for start in (lambda: canaries.set_canary(acme, "best", models[1], 10.0, POLICY),
                  lambda: canaries.set_shadow(acme, "best", models[1], 10.0)):  # fmt: skip
        kind = start().kind
        with pytest.raises(ConflictError, match="tries out") as caught:
            control.registry.delete_model(acme, models[1])
        assert caught.value.code == "model_in_use"
        assert canaries.abort(acme, "best", kind).outcome is Outcome.ABORTED
    assert control.registry.delete_model(acme, models[1]) == "b" * 64


def test_wrong_candidates_are_refused_with_the_reason(
    control: Control, canaries: Canaries, models: tuple[str, str]
) -> None:
    acme, other = control.acme.id, control.publish(digest="c" * 64)
    theirs = control.publish(control.zenith, alias="best")
    for model, alias, error in (
        (models[0], "best", InvalidRequestError),
        (theirs, "best", NotFoundError),
        ("tiny", "best", NotFoundError),
        (models[1], "worst", NotFoundError),
    ):
        with pytest.raises(error):
            canaries.set_canary(acme, alias, model, 10.0, POLICY)
    canaries.set_canary(acme, "best", models[1], 10.0, POLICY)
    with pytest.raises(ConflictError) as caught:
        canaries.set_canary(acme, "best", other, 10.0, POLICY)
    assert caught.value.code == "canary_running"
    for ask in (canaries.running, canaries.abort):
        with pytest.raises(NotFoundError):
            ask(control.zenith.id, "best", CANARY)
    assert canaries.list(control.zenith.id, "best", after=None, limit=10).items == ()


@pytest.mark.parametrize("measure", [Measure.ERROR, Measure.DOWN])
def test_a_canary_that_is_worse_is_rolled_back_by_itself(
    control: Control, canaries: Canaries, models: tuple[str, str], traffic: TrafficLog, measure: Measure
) -> None:
    canary = canaries.set_canary(control.acme.id, "best", models[1], 10.0, POLICY)
    observe(traffic, canary, Arm.STABLE, measure, *[0.0] * 60)
    observe(traffic, canary, Arm.CANARY, measure, *[1.0] * 19)
    traffic.flush()
    assert canaries.running(control.acme.id, "best", CANARY).is_running, "one short of min_samples"
    observe(traffic, canary, Arm.CANARY, measure, 1.0)
    traffic.flush()
    found = ended(canaries, control)
    assert found.outcome is Outcome.ROLLED_BACK and found.reason is not None
    assert "100 % of 20" in found.reason and "0 % of 60" in found.reason
    assert control.registry.aliases.get(control.acme.id, "best").model == models[0]
    assert route(control, "u").trial is None


def test_promotion_by_itself_needs_the_policy_and_both_proofs(
    control: Control, canaries: Canaries, models: tuple[str, str], traffic: TrafficLog
) -> None:
    eager = CanaryPolicy(auto_promote=True, promote_margin=0.2)
    canary = canaries.set_canary(control.acme.id, "best", models[1], 50.0, eager)
    for arm in (Arm.STABLE, Arm.CANARY):
        observe(traffic, canary, arm, Measure.ERROR, *[0.0] * 300)
    traffic.flush()
    assert canaries.running(control.acme.id, "best", CANARY).is_running, "there is no feedback yet"
    for arm in (Arm.STABLE, Arm.CANARY):
        observe(traffic, canary, arm, Measure.DOWN, *[0.0] * 150)
    canaries.set_canary(control.acme.id, "best", models[1], 50.0, POLICY)
    traffic.flush()
    assert canaries.running(control.acme.id, "best", CANARY).is_running, "the policy does not ask for it"
    canaries.set_canary(control.acme.id, "best", models[1], 50.0, eager)
    canaries.judge(canary.id)
    assert ended(canaries, control).outcome is Outcome.PROMOTED
    alias = control.registry.aliases.get(control.acme.id, "best")
    assert (alias.model, alias.history[0].kind) == (models[1], MoveKind.PROMOTED)


def test_experiments_and_their_numbers_survive_a_restart(
    control: Control, canaries: Canaries, models: tuple[str, str]
) -> None:
    before = TrafficLog(control.database, Retention(), judge=canaries.judge, on_dropped=pytest.fail, flush_seconds=60)
    before.start()
    canary = canaries.set_canary(control.acme.id, "best", models[1], 25.0, CanaryPolicy(min_samples=7))
    side = route(control, "u")
    observe(before, canary, Arm.CANARY, Measure.SECONDS, 1.0, 3.0)
    before.stop()
    again = connect(control.url)
    registry = Registry(again, BASE)
    reopened = Canaries(again, registry)
    found = reopened.running(control.acme.id, "best", CANARY)
    assert found == canary and found.policy == CanaryPolicy(min_samples=7)
    moments = reopened.measured(found)[Arm.CANARY, Measure.SECONDS]
    assert (moments.count, moments.total, moments.squares) == (2, 4.0, 10.0)
    assert registry.route(control.acme.id, "best", lambda: "u") == side
    again.close()


def test_of_all_who_would_end_a_canary_at_once_one_does(
    control: Control, canaries: Canaries, models: tuple[str, str], traffic: TrafficLog
) -> None:
    acme = control.acme.id
    outcomes = set()
    for _ in range(4):
        control.registry.aliases.set(acme, "best", models[0])
        canary = canaries.set_canary(acme, "best", models[1], 10.0, POLICY)
        observe(traffic, canary, Arm.STABLE, Measure.ERROR, *[0.0] * 60)
        observe(traffic, canary, Arm.CANARY, Measure.ERROR, *[1.0] * 60)
        start, before = Barrier(4), len(control.registry.aliases.get(acme, "best").history)

        def together(action: Callable[[], object], start: Barrier = start) -> bool:
            start.wait(10)
            try:
                action()
            except ServiceError:
                return False
            return True

        actions = (
            traffic.flush,
            lambda: canaries.promote(acme, "best", None),
            lambda: canaries.promote(acme, "best", None),
            lambda: canaries.abort(acme, "best", CANARY),
        )
        with ThreadPoolExecutor(4) as pool:
            done = list(pool.map(together, actions))
        found, alias = ended(canaries, control), control.registry.aliases.get(acme, "best")
        assert found.id == canary.id and found.outcome is not None
        promoted = found.outcome is Outcome.PROMOTED
        assert (alias.model == models[1]) == promoted
        assert len(alias.history) == before + promoted
        assert sum(done[1:]) == (found.outcome is not Outcome.ROLLED_BACK)
        outcomes.add(found.outcome)
    assert outcomes <= {Outcome.PROMOTED, Outcome.ABORTED, Outcome.ROLLED_BACK}


def test_a_deleted_tenant_takes_its_experiments_along_and_its_last_numbers_harm_nobody(
    control: Control, canaries: Canaries, models: tuple[str, str], traffic: TrafficLog
) -> None:
    canary = canaries.set_canary(control.acme.id, "best", models[1], 10.0, POLICY)
    observe(traffic, canary, Arm.CANARY, Measure.ERROR, 1.0)
    control.tenants.delete(control.acme.id)
    traffic.flush()
    assert canaries.measured(canary) == {}
