"""Probes stay behind everybody's requests, and within their share of the time."""

from __future__ import annotations

import threading
import time

import pytest

from service.drift_probe import MAX_STEP_SECONDS, PROBE_PRIORITY, QUIET_SECONDS, SHARE, ProbeBudget, Prober
from service.engine.errors import EngineDeadError, QueueFullError
from tests.service.drift_fixtures import ProbedEngine, wait_until

PROMPT = tuple(range(100))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def prober(engine: ProbedEngine, clock: Clock | None = None, stopping: threading.Event | None = None) -> Prober:
    is_stopping = (stopping or threading.Event()).is_set
    return Prober(engine, chunk_tokens=128, is_stopping=is_stopping, clock=clock or time.monotonic)


def test_a_probe_asks_the_base_behind_everybody_for_an_account_of_its_own() -> None:
    engine = ProbedEngine()
    probed = prober(engine).measure("acme", PROMPT)
    assert probed is not None and probed.embedding.shape == (4,) and probed.nll == 2.0
    (request,) = engine.probes
    assert (request.priority, request.tenant, request.adapter) == (PROBE_PRIORITY, "acme/drift", None)
    assert request.pooling and request.measure and request.timeout_seconds is not None


@pytest.mark.parametrize(
    "engine", [ProbedEngine(refusal=QueueFullError("full", retry_after=1.0)), ProbedEngine(fails=True)]
)
def test_a_probe_that_the_engine_does_not_answer_is_none(engine: ProbedEngine) -> None:
    assert prober(engine).measure("acme", PROMPT) is None


def test_a_stopping_service_does_not_wait_for_its_probe() -> None:
    engine, stopping = ProbedEngine(silent=True), threading.Event()
    done: list[object] = []
    thread = threading.Thread(target=lambda: done.append(prober(engine, stopping=stopping).measure("acme", PROMPT)))
    thread.start()
    wait_until(lambda: bool(engine.probes))
    stopping.set()
    thread.join(5)
    assert done == [None] and engine.aborted == [engine.probes[0].request_id]


def test_an_idle_engine_is_probed_freely_and_a_dead_one_is_not() -> None:
    engine, clock = ProbedEngine(), Clock()
    engine.on_probe = lambda request: setattr(clock, "now", clock.now + 5.0)
    one = prober(engine, clock)
    for _ in range(10):
        assert one.may_start and one.measure("acme", PROMPT) is not None
    engine.alive = False
    assert not one.may_start
    engine.refusal = EngineDeadError("gone")
    assert one.measure("acme", PROMPT) is None


def test_the_gap_before_somebody_asks_again_is_not_free() -> None:
    """A client that asks as soon as it is answered met a probe in each gap."""
    engine, clock = ProbedEngine(), Clock()
    one = prober(engine, clock)

    def may_start() -> bool:
        return one.may_start

    clock.now = engine.last_step_at = 10.0
    assert may_start(), "there is no debt"
    engine.on_probe = lambda request: setattr(clock, "now", clock.now + 5.0)
    probed = one.measure("acme", PROMPT)
    assert probed is not None and not probed.is_free
    assert may_start(), "since then there was nobody"
    engine.last_step_at = clock.now = clock.now + 1.0
    assert not may_start()
    clock.now += 2 * QUIET_SECONDS
    probed = one.measure("acme", PROMPT) if may_start() else None
    assert probed is not None and probed.is_free


def test_who_came_after_the_latest_picture_of_the_engine_is_seen() -> None:
    """A picture of an engine in its own process is late: a short request is over before it shows in one."""
    engine, clock = ProbedEngine(), Clock()
    one = prober(engine, clock)

    def may_start() -> bool:
        return one.may_start

    engine.on_probe = lambda request: setattr(clock, "now", clock.now + 0.05)
    clock.now = engine.last_step_at = 10.0
    assert one.measure("acme", PROMPT) is not None, "which leaves a debt"
    assert may_start(), "since then there was nobody"
    engine.num_open = 1
    assert not may_start()
    clock.now += 0.1
    engine.num_open, engine.last_ended_at = 0, clock.now
    assert not may_start()
    clock.now += 2 * QUIET_SECONDS
    assert may_start()


@pytest.mark.parametrize("known_seconds", [None, 0.02])
def test_beside_others_probes_take_their_share_of_the_time_and_no_more(known_seconds: float | None) -> None:
    engine, clock, took = ProbedEngine(), Clock(), [0.0]

    def work(seconds: float) -> None:
        clock.now += seconds
        took[0] += seconds

    one = prober(engine, clock)
    if known_seconds is not None:  # then it is charged that, however long it waited for its turn
        engine.on_probe = lambda request: work(known_seconds)
        one.measure("acme", PROMPT)
    engine.num_running, cost = 3, known_seconds or 0.05
    engine.on_probe = lambda request: work(0.05)
    num_probes, start = 0, clock.now
    while clock.now - start < 1000.0:
        if one.may_start:
            assert one.measure("acme", PROMPT) is not None
            num_probes += 1
        clock.now += 0.1
    assert num_probes * cost / 1000.0 == pytest.approx(SHARE, rel=0.05)


def test_nothing_is_saved_up_for_a_burst() -> None:
    """Neither in the time without anybody nor in that without a prompt to measure."""
    clock = Clock()
    budget = ProbeBudget(clock, share=0.01)
    budget.charge(0.03)
    clock.now += 1e6
    budget.idle()
    assert budget.debt_seconds == 0.03
    for _ in range(10):
        clock.now += 0.1
        assert budget.debt_seconds > 0
    assert budget.debt_seconds == pytest.approx(0.02)
    clock.now += 1e6  # nobody asked meanwhile
    assert budget.debt_seconds == pytest.approx(0.02 - MAX_STEP_SECONDS * 0.01)


@pytest.mark.slow
def test_bursts_of_requests_meet_no_more_probes_than_steady_ones() -> None:
    engine, clock, num_beside = ProbedEngine(), Clock(), 0
    one = prober(engine, clock)
    engine.on_probe = lambda request: setattr(clock, "now", clock.now + 0.05)
    for _ in range(500):
        engine.num_running, end = 1, clock.now + 2.0
        while clock.now < end:
            if one.may_start:
                assert one.measure("acme", PROMPT) is not None
                num_beside += 1
            clock.now += 0.1
        engine.num_running, engine.last_step_at, end = 0, clock.now, clock.now + 10.0
        while clock.now < end:
            if one.may_start:
                assert one.measure("acme", PROMPT) is not None
            clock.now += 0.1
    assert num_beside * 0.05 / 1000.0 == pytest.approx(SHARE, rel=0.15)
