"""A version's answers against its first ones."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.drift.calibration import mean_run_length
from adapters.drift.monitor import OutputMonitor, Reading
from adapters.drift.output_monitor import BASELINE_SIZE, EVENTS, NUMBERS, SIGNALS
from adapters.errors import DriftReferenceError
from tests.adapters.drifting import nothing

RUN_LENGTH = 400.0
Answer = dict[str, float | None]


def _answers(seed: int, num: int, **changed: float) -> list[Answer]:
    """Entropy goes with NLL; lengths have many equal values; the adapter never writes JSON."""
    rng = np.random.default_rng([seed, 3])
    common = rng.standard_normal(num)
    return [
        {
            "answer_nll": float(np.exp(common[i])) * changed.get("answer_nll", 1.0),
            "answer_entropy": float(common[i] + 0.3 * rng.standard_normal()),
            "answer_length": float(rng.poisson(20)) * changed.get("answer_length", 1.0),
            "finish_length": float(rng.random() < changed.get("finish_length", 0.1)),
            "valid_json": None,
            "refusal": float(rng.random() < changed.get("refusal", 0.01)),
        }
        for i in range(num)
    ]


def _calibrated(seed: int, run_length: float = RUN_LENGTH) -> OutputMonitor:
    monitor = OutputMonitor(run_length, seed)
    for answer in _answers(seed, BASELINE_SIZE):
        monitor.observe(answer)
    monitor.calibrate(nothing)
    return monitor


@pytest.fixture(scope="module")
def kept() -> bytes:
    return _calibrated(0).state_dict()


def test_nothing_is_known_before_the_baseline_is_whole_and_calibrated() -> None:
    monitor = OutputMonitor(RUN_LENGTH, 0)
    for count, answer in enumerate(_answers(0, BASELINE_SIZE), 1):
        assert not monitor.needs_calibration
        readings = monitor.observe(answer)
        assert [reading.ratio for reading in readings] == [None] * len(SIGNALS)
        assert readings[0].samples == count and readings[SIGNALS.index("valid_json")].samples == 0
    assert monitor.needs_calibration
    assert monitor.observe(_answers(1, 1)[0])[0].samples == BASELINE_SIZE  # not counted while it is calibrated
    monitor.calibrate(nothing)
    for count, answer in enumerate(_answers(2, 33), 1):
        readings = monitor.observe(answer)
        assert readings[0].samples == count and (readings[0].ratio is not None) == (count >= 32)
    known = {reading.signal for reading in readings if reading.ratio is not None}
    assert known == set(SIGNALS) - {"valid_json"}


@pytest.mark.parametrize(
    ("signal", "to"),
    [("answer_nll", 8.0), ("answer_length", 1.6), ("answer_length", 0.5), ("refusal", 0.4), ("finish_length", 0.6)],
)
def test_a_changed_answer_is_found_and_named(kept: bytes, signal: str, to: float) -> None:
    monitor = OutputMonitor(RUN_LENGTH, 0, kept)
    for answer in _answers(5, 80, **{signal: to}):
        readings = monitor.observe(answer)
    assert {reading.signal for reading in readings if reading.alarm} == {signal}
    assert all(reading.ratio is None or reading.ratio <= 2 for reading in readings)


@pytest.mark.parametrize("seen", [0, 7, BASELINE_SIZE, BASELINE_SIZE + 50])
def test_a_restored_monitor_reads_what_the_first_would_have(seen: int) -> None:
    answers = _answers(6, BASELINE_SIZE + 120)
    first = OutputMonitor(RUN_LENGTH, 4)
    _feed(first, answers[:seen])
    second = OutputMonitor(RUN_LENGTH, 4, first.state_dict())
    assert second.readings() == first.readings() and second.needs_calibration == first.needs_calibration
    assert _feed(second, answers[seen:]) == _feed(first, answers[seen:])
    assert second.state_dict() == first.state_dict()


def _feed(monitor: OutputMonitor, answers: list[Answer]) -> list[tuple[Reading, ...]]:
    found = []
    for answer in answers:
        if monitor.needs_calibration:
            monitor.calibrate(nothing)
        found.append(monitor.observe(answer))
    return found


def test_a_reset_signal_begins_again_against_the_same_baseline(kept: bytes) -> None:
    monitor = OutputMonitor(RUN_LENGTH, 0, kept)
    for answer in _answers(5, 80, refusal=0.5):
        before = monitor.observe(answer)
    monitor.reset("refusal")
    assert monitor.readings()[:-1] == before[:-1]
    assert (monitor.readings()[-1].samples, monitor.readings()[-1].ratio) == (0, None)
    for answer in _answers(7, 80, refusal=0.5):
        after = monitor.observe(answer)
    assert after[-1].alarm
    monitor.reset()
    assert {reading.samples for reading in monitor.readings()} == {0} and not monitor.needs_calibration


def test_what_is_no_signal_or_no_state_is_refused(kept: bytes) -> None:
    monitor = OutputMonitor(RUN_LENGTH, 0)
    with pytest.raises(DriftReferenceError, match="prompt_nll is no signal"):
        monitor.observe({"prompt_nll": 1.0})
    with pytest.raises(KeyError):
        monitor.reset("prompt_nll")
    for broken in (b"", kept[: len(kept) // 2]):
        with pytest.raises(DriftReferenceError, match="begin again"):
            OutputMonitor(RUN_LENGTH, 0, broken)
    assert set(NUMBERS) | set(EVENTS) == set(SIGNALS)


def test_calibration_can_be_stopped_and_begun_again() -> None:
    def stop() -> None:
        raise InterruptedError

    monitor = OutputMonitor(RUN_LENGTH, 0)
    for answer in _answers(0, BASELINE_SIZE):
        monitor.observe(answer)
    with pytest.raises(InterruptedError):
        monitor.calibrate(stop)
    assert monitor.needs_calibration
    monitor.calibrate(nothing)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_without_drift_the_mean_run_over_many_baselines_is_the_promised_one() -> None:
    """Signals that go together alarm together, so the run may be longer than promised, but not much."""
    num_steps, alarms = int(4 * RUN_LENGTH), []
    for seed in range(40):
        state = _calibrated(100 + seed).state_dict()
        for stream in range(4):
            monitor, alarm = OutputMonitor(RUN_LENGTH, 100 + seed, state), num_steps + 1
            for count, answer in enumerate(_answers(10_000 + 100 * seed + stream, num_steps), 1):
                if any(reading.alarm for reading in monitor.observe(answer)):
                    alarm = count
                    break
            alarms.append(alarm)
    assert mean_run_length(np.array(alarms), num_steps) == pytest.approx(RUN_LENGTH, rel=0.35)
