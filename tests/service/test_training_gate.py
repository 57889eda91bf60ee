"""The gate on a clock of its own, and beside the real engine and the real trainer on a tiny base."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

from adapters.pausing import current_pause, pausing
from service.config import Settings
from service.engine.messages import Happened
from service.engine.sequence import GenerationRequest, SamplingParams
from service.engine_main import _Reporter
from service.engine_room import training_gates
from service.heartbeat import StopReason, StopRequested
from service.job import Job, JobStatus
from service.metrics import Metrics
from service.training_gate import LONGEST_HOLD_SECONDS, POLL_SECONDS, TrainingGate
from service.training_pace import FLOOR, PaceLimits, TrainingPace
from service.tuning_worker import TuningWorker
from tests.service.tuning_fixtures import QUICK, Workshop, tiny_base, workshop

__all__ = ["tiny_base", "workshop"]

LONG = replace(QUICK, n_epochs=50, early_stopping_patience=None, learning_rate=1e-4)


def go_on() -> None:
    """A check that finds no reason to stop."""


@dataclass
class Stage:
    """A gate whose time passes only while somebody works or sleeps."""

    limits: PaceLimits = field(default_factory=lambda: PaceLimits(None, share=0.25))
    now: float = 0.0
    serving_until: float = float("inf")
    paced: list[tuple[float, float | None, float]] = field(default_factory=list)
    drains: int = 0

    def __post_init__(self) -> None:
        self.gate = TrainingGate(
            TrainingPace(self.limits),
            is_serving=lambda: self.now < self.serving_until,
            step_seconds=list,
            observer=self,
            drain=self._drain,
            clock=lambda: self.now,
            sleep=self.work,
        )

    def work(self, seconds: float) -> None:
        self.now += seconds

    def training_paced(self, ratio: float, p99_seconds: float | None, held_seconds: float) -> None:
        self.paced.append((ratio, p99_seconds, held_seconds))

    def _drain(self) -> None:
        self.drains += 1


def test_while_answers_are_written_training_gets_its_share_of_the_time() -> None:
    stage, worked = Stage(), 0.0
    for burst in itertools.islice(itertools.cycle([0.003, 0.0001, 0.012]), 3000):
        stage.work(burst)
        worked += burst
        stage.gate.hold(go_on)
    assert worked / stage.now == pytest.approx(0.25, rel=0.01)


def test_while_nobody_waits_for_an_answer_training_is_never_held() -> None:
    stage = Stage(serving_until=0.0)
    for _ in range(100):
        stage.work(0.01)
        stage.gate.hold(go_on)
    assert stage.now == pytest.approx(1.0) and stage.drains == 0


def test_what_training_did_while_nobody_waited_is_not_owed_later() -> None:
    stage = Stage(serving_until=0.0)
    stage.work(0.5)
    stage.gate.hold(go_on)
    stage.serving_until = float("inf")
    stage.work(0.002)
    stage.gate.hold(go_on)
    assert stage.now == pytest.approx(0.502 + 0.006)


def test_a_hold_ends_as_soon_as_the_last_answer_is_written() -> None:
    stage = Stage(serving_until=0.2)
    stage.work(0.1)
    stage.gate.hold(go_on)
    assert 0.2 <= stage.now <= 0.2 + POLL_SECONDS


def test_a_thread_that_wakes_late_has_that_time_to_its_credit() -> None:
    stage, worked = Stage(), 0.0
    stage.gate._sleep = lambda seconds: stage.work(seconds + 0.01)
    for _ in range(1000):
        stage.work(0.003)
        worked += 0.003
        stage.gate.hold(go_on)
    assert worked / stage.now == pytest.approx(0.25, rel=0.02)


def test_time_in_which_training_itself_stood_in_line_is_not_owed() -> None:
    stage = Stage()
    stage.gate._work_clock = lambda: stage.now / 2  # as a thread's own time, half of it spent behind others
    stage.gate.hold(go_on)
    stage.work(0.1)
    stage.gate.hold(go_on)
    assert stage.now == pytest.approx(0.1 + 0.05 * 3)


def test_one_long_piece_of_work_does_not_hold_training_for_ever() -> None:
    stage = Stage()
    stage.work(60.0)
    stage.gate.hold(go_on)
    assert stage.now == pytest.approx(60.0 + LONGEST_HOLD_SECONDS)


def test_with_no_share_at_all_training_waits_for_an_idle_engine_and_says_so() -> None:
    stage = Stage(PaceLimits(None, share=0.0), serving_until=30.0)
    stage.work(0.01)
    stage.gate.hold(go_on)
    assert 30.0 <= stage.now <= 30.0 + POLL_SECONDS
    assert sum(held for _, _, held in stage.paced) == pytest.approx(30.0, abs=1.1)
    assert {ratio for ratio, _, _ in stage.paced} == {0.0}


def test_a_stop_ends_the_hold_but_is_not_raised_in_the_middle_of_a_layer() -> None:
    stage = Stage(PaceLimits(None, share=0.0))

    def check() -> None:
        if stage.now > 1.0:
            raise StopRequested(StopReason.CANCELLED)

    stage.work(0.01)
    stage.gate.hold(check)
    assert stage.now == pytest.approx(1.0, abs=2 * POLL_SECONDS)


def test_time_is_told_when_the_device_is_done_and_only_where_it_matters() -> None:
    stage = Stage(PaceLimits(10.0))
    stage.work(0.01)
    stage.gate.hold(go_on)
    assert stage.drains == 0, "at full pace training is not slowed by waiting for its own device"
    stage = Stage()
    stage.work(0.01)
    stage.gate.hold(go_on)
    assert stage.drains == 1


def test_pauses_belong_to_the_thread_that_installed_them() -> None:
    seen: list[object] = []
    with pausing(go_on):
        assert current_pause() is go_on
        thread = threading.Thread(target=lambda: seen.append(current_pause()))
        thread.start()
        thread.join()
    assert seen == [None] and current_pause() is None


class Paced:
    """A gate beside the workshop's engine, and what it did."""

    def __init__(self, workshop: Workshop, limits: PaceLimits) -> None:
        self.ratios: list[float] = []
        self.held = 0.0
        self.slept = 0.0
        self.gate = TrainingGate(
            TrainingPace(limits),
            is_serving=lambda: workshop.engine.is_busy,
            step_seconds=workshop.engine.step_times.take,
            observer=self,
            sleep=self._sleep,
        )

    def training_paced(self, ratio: float, p99_seconds: float | None, held_seconds: float) -> None:
        self.ratios.append(ratio)
        self.held += held_seconds

    def _sleep(self, seconds: float) -> None:
        self.slept += seconds
        time.sleep(seconds)


@contextmanager
def working(workshop: Workshop, gate: TrainingGate | None) -> Iterator[TuningWorker]:
    worker = TuningWorker(workshop.services, name="worker", gate=gate, poll_seconds=0.02, heartbeat_seconds=0.02)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()
        assert not worker.alive


@contextmanager
def answers_without_end(workshop: Workshop) -> Iterator[None]:
    """Somebody waits for a token at every moment."""
    ended = threading.Event()

    def ask(number: int) -> None:
        done = threading.Event()

        def hear(chunk: object) -> None:
            if getattr(chunk, "finish_reason", None) is not None:
                done.set()

        sampling = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
        for count in itertools.count():
            if ended.is_set():
                return
            done.clear()
            workshop.engine.submit(GenerationRequest(f"load-{number}-{count}", (5, 6, 7), sampling, "acme"), hear)
            assert done.wait(30)

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(30)


@pytest.mark.slow
def test_under_an_impossible_target_training_goes_on_at_the_floor(workshop: Workshop) -> None:
    paced = Paced(workshop, PaceLimits(1e-6))
    job = workshop.submit(hyperparameters=LONG)
    with answers_without_end(workshop), working(workshop, paced.gate):
        workshop.await_that(lambda: workshop.tally.num_tokens > 0 and paced.ratios[-1:] == [FLOOR])
        before = workshop.tally.num_tokens
        workshop.await_that(lambda: workshop.tally.num_tokens > before)
        assert paced.held > 0
        began = time.monotonic()
        workshop.control.jobs.cancel(workshop.control.acme.id, job.id)
        workshop.await_that(lambda: workshop.tally.outcomes == ["cancelled"])
        assert time.monotonic() - began < 10


@pytest.mark.slow
def test_holding_training_back_changes_no_bit_of_the_adapter(workshop: Workshop) -> None:
    def trained(gate: TrainingGate | None) -> str:
        job: Job = workshop.submit(hyperparameters=replace(QUICK, n_epochs=1))
        with working(workshop, gate):
            workshop.await_state(job, JobStatus.SUCCEEDED)
        return workshop.digest(job)

    free = trained(None)
    paced = Paced(workshop, PaceLimits(None, share=0.5))
    with answers_without_end(workshop):
        held = trained(paced.gate)
    assert held == free
    assert paced.slept > 0


@pytest.mark.slow
def test_while_the_engine_is_idle_an_impossible_target_costs_training_nothing(workshop: Workshop) -> None:
    paced = Paced(workshop, PaceLimits(1e-6))
    job = workshop.submit(hyperparameters=LONG)
    with working(workshop, paced.gate):
        workshop.await_that(lambda: workshop.tally.num_tokens > 500)
        workshop.control.jobs.cancel(workshop.control.acme.id, job.id)
        workshop.await_that(lambda: workshop.tally.outcomes == ["cancelled"])
    assert paced.slept == 0


def test_settings_decide_whether_there_is_a_gate_at_all(workshop: Workshop) -> None:
    paced = Paced(workshop, PaceLimits(1.0))
    assert training_gates(Settings(), workshop.engine, paced) is None
    assert training_gates(Settings(itl_target_ms=40.0), workshop.engine, paced) is not None
    assert training_gates(Settings(training_share=0.5), workshop.engine, paced) is not None


def test_what_the_gate_reports_in_the_engines_process_reaches_the_metrics_of_the_api() -> None:
    metrics = Metrics()

    class Host:
        def report(self, method: str, *arguments: object) -> None:
            happened = Happened(method, arguments)
            getattr(metrics, happened.method)(*happened.arguments)

    _Reporter(Host()).training_paced(0.25, 0.03, 2.0)  # type: ignore[arg-type]
    text = metrics.exposition("")[0].decode()
    assert "rootstock_training_pace_ratio 0.25" in text
    assert "rootstock_training_held_seconds_total 2.0" in text
