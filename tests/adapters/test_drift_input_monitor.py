"""A stream of prompts against its reference: what is known when, what is found, and what survives a restart."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.drift.calibration import mean_run_length
from adapters.drift.mmd import mmd2
from adapters.drift.monitor import EMBEDDING, InputMonitor, Reading
from adapters.drift.reference import DriftReference
from adapters.errors import DriftReferenceError
from tests.adapters.drifting import RUN_LENGTH, WIDTH, numbers, reference, vectors

Prompt = tuple[NDArray[np.float32], dict[str, float]]


@pytest.fixture(scope="module")
def made() -> DriftReference:
    return reference(0)


def _prompts(seed: int, num: int, shift: float = 0.0) -> list[Prompt]:
    rng = np.random.default_rng([seed, 2])
    rows, columns = vectors(rng, num, shift), numbers(rng, num)
    return [(row, {name: float(columns[name][i]) for name in columns}) for i, row in enumerate(rows)]


def _alarms(readings: tuple[Reading, ...]) -> set[str]:
    return {reading.signal for reading in readings if reading.alarm}


def test_nothing_is_known_before_the_smallest_window_is_full(made: DriftReference) -> None:
    monitor = InputMonitor(made)
    for count, prompt in enumerate(_prompts(1, 40), 1):
        readings = monitor.observe(*prompt)
        assert [reading.signal for reading in readings] == [EMBEDDING, "prompt_length", "prompt_nll"]
        assert {reading.samples for reading in readings} == {count}
        for reading in readings:
            known = count >= 32
            assert (reading.ratio is not None) == (reading.statistic is not None) == known


def test_the_embedding_is_read_from_the_window_that_is_nearer_to_its_threshold(made: DriftReference) -> None:
    monitor, prompts = InputMonitor(made), _prompts(2, 90)
    points = made.project(np.stack([embedding for embedding, _ in prompts]))
    for count, prompt in enumerate(prompts, 1):
        reading = monitor.observe(*prompt)[0]
        slow = [
            mmd2(made.points, points[count - window : count], made.bandwidth)
            / made.thresholds[window][min(count - window, window - 1)]
            for window in (32, 64)
            if count >= window
        ]
        assert reading.ratio == (pytest.approx(max(slow), abs=1e-3) if slow else None)


def test_a_changed_kind_of_prompt_is_found_and_named(made: DriftReference) -> None:
    monitor = InputMonitor(made)
    for prompt in _prompts(3, 100):
        assert not _alarms(monitor.observe(*prompt))
    found = [_alarms(monitor.observe(*prompt)) for prompt in _prompts(4, 60, shift=2.0)]
    assert found[-1] == {EMBEDDING}
    assert [] != [count for count, names in enumerate(found) if names][:1] < [30]


def test_longer_prompts_are_found_and_named(made: DriftReference) -> None:
    monitor = InputMonitor(made)
    for embedding, values in _prompts(5, 60):
        readings = monitor.observe(embedding, values | {"prompt_length": values["prompt_length"] * 3})
    assert _alarms(readings) == {"prompt_length"}
    assert all(reading.ratio is None or reading.ratio <= 2 for reading in readings[1:])


@pytest.mark.parametrize("seen", [0, 1, 31, 40, 64, 150])
def test_a_restored_monitor_reads_what_the_first_would_have(made: DriftReference, seen: int) -> None:
    prompts = _prompts(6, seen + 70, shift=0.4)
    first = InputMonitor(made)
    for prompt in prompts[:seen]:
        first.observe(*prompt)
    second = InputMonitor(made, first.state_dict())
    assert second.readings() == first.readings()
    for prompt in prompts[seen:]:
        assert second.observe(*prompt) == first.observe(*prompt)
    assert second.state_dict() == first.state_dict()


def test_a_state_is_small_and_belongs_to_its_reference(made: DriftReference) -> None:
    monitor = InputMonitor(made)
    for prompt in _prompts(7, 100):
        monitor.observe(*prompt)
    state = monitor.state_dict()
    assert len(state) < 20_000
    with pytest.raises(DriftReferenceError, match="another reference"):
        InputMonitor(reference(1, num=64), state)
    for broken in (b"", state[: len(state) // 2], b"{}"):
        with pytest.raises(DriftReferenceError, match="begin again"):
            InputMonitor(made, broken)


def test_a_reset_signal_begins_again_and_the_others_go_on(made: DriftReference) -> None:
    monitor = InputMonitor(made)
    for prompt in _prompts(8, 70, shift=2.0):
        before = monitor.observe(*prompt)
    assert before[0].alarm
    monitor.reset(EMBEDDING)
    after = monitor.readings()
    assert (after[0].samples, after[0].ratio) == (0, None) and after[1:] == before[1:]
    monitor.reset()
    assert {reading.samples for reading in monitor.readings()} == {0}
    with pytest.raises(KeyError):
        monitor.reset("answer_nll")


def test_a_number_that_was_not_measured_does_not_count(made: DriftReference) -> None:
    monitor = InputMonitor(made)
    for embedding, values in _prompts(9, 35):
        readings = monitor.observe(embedding, {"prompt_length": values["prompt_length"]})
    assert [reading.samples for reading in readings] == [35, 35, 0]
    assert readings[2].ratio is None


def test_a_vector_of_another_base_is_refused(made: DriftReference) -> None:
    monitor = InputMonitor(made)
    for wrong in (np.zeros(WIDTH + 1, np.float32), np.full(WIDTH, np.nan, np.float32)):
        with pytest.raises(DriftReferenceError, match=f"{WIDTH} numbers"):
            monitor.observe(wrong, {})
    assert monitor.readings()[0].samples == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_without_drift_the_mean_run_over_many_small_references_is_the_promised_one() -> None:
    """The whole monitor, one observation after the other: 40 references of 75 points, 4 streams each."""
    num_steps, alarms = int(3 * RUN_LENGTH), []
    for seed in range(40):
        made = reference(100 + seed)
        for stream in range(4):
            monitor, alarm = InputMonitor(made), num_steps + 1
            for count, prompt in enumerate(_prompts(1000 * seed + stream, num_steps), 1):
                if _alarms(monitor.observe(*prompt)):
                    alarm = count
                    break
            alarms.append(alarm)
    # The error of the mean of 160 runs is 8 % by itself, and more as the runs of one reference are alike.
    assert mean_run_length(np.array(alarms), num_steps) == pytest.approx(RUN_LENGTH, rel=0.3)
