"""Levels under which streams run as long as promised, on paths whose law is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.drift.calibration import calibrate, first_alarms, mean_run_length, num_steps_for, starting_thresholds
from tests.adapters.drifting import nothing

PROMISE = 200.0


def _paths(rng: np.random.Generator, num_streams: int, num_steps: int) -> dict[str, NDArray[np.float32]]:
    """Two signals of one stream that go together: a moving mean, and the newest value."""
    noise = rng.standard_normal((num_streams, num_steps + 7))
    sums = np.cumsum(noise, axis=1)
    return {
        "mean": (sums[:, 7:] - np.pad(sums, ((0, 0), (1, 0)))[:, :num_steps]).astype(np.float32),
        "newest": np.exp(noise[:, 7:]).astype(np.float32),
    }


def test_the_first_alarm_is_that_of_any_signal() -> None:
    paths = {"a": np.array([[0, 3, 0], [0, 0, 0]], np.float32), "b": np.array([[0, 0, 9], [5, 0, 0]], np.float32)}
    assert first_alarms(paths, {"a": 2.0, "b": 4.0}).tolist() == [2, 1]
    assert first_alarms(paths, {"a": 4.0, "b": 10.0}).tolist() == [4, 4]


@pytest.mark.parametrize("num_steps", [100, 1000])
def test_the_mean_run_length_of_streams_that_were_not_watched_to_their_end(num_steps: int) -> None:
    alarms = np.random.default_rng(0).geometric(1 / PROMISE, 20_000)
    seen = np.minimum(alarms, num_steps + 1)
    assert mean_run_length(seen, num_steps) == pytest.approx(PROMISE, rel=0.05)


def test_two_signals_that_go_together_keep_the_promise_together() -> None:
    rng = np.random.default_rng(0)
    levels = calibrate(_paths(rng, 500, 600), {"mean": 0.5, "newest": 0.5}, PROMISE, nothing)
    new = _paths(rng, 1500, 1600)
    assert mean_run_length(first_alarms(new, levels), 1600) == pytest.approx(PROMISE, rel=0.12)
    alone = [mean_run_length(first_alarms({name: new[name]}, {name: level}), 1600) for name, level in levels.items()]
    assert min(alone) > 1.3 * PROMISE  # neither has it all


def test_a_promise_beyond_the_simulated_streams_is_kept_by_extrapolation() -> None:
    rng = np.random.default_rng(1)
    level = calibrate({"newest": _paths(rng, 800, 300)["newest"]}, {"newest": 1.0}, 1000.0, nothing)["newest"]
    new = _paths(rng, 500, 4000)["newest"]
    assert mean_run_length(first_alarms({"newest": new}, {"newest": level}), 4000) == pytest.approx(1000, rel=0.25)


def test_calibration_can_be_stopped() -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        calibrate(_paths(np.random.default_rng(0), 10, 50), {"mean": 0.5, "newest": 0.5}, PROMISE, stop)


def test_first_thresholds_make_alarms_as_rare_at_first_as_later() -> None:
    """With one threshold for all, the first full window would alarm several times as often as a later step does."""
    rng = np.random.default_rng(2)
    window = 8
    path = _paths(rng, 2000, 600)["mean"]
    path[:, : window - 1] = -np.inf
    level = calibrate({"mean": path}, {"mean": 1.0}, PROMISE, nothing)["mean"]
    thresholds = starting_thresholds(path, window, level, PROMISE)
    assert thresholds[-1] == level and thresholds[0] > level
    new = _paths(rng, 60_000, window)["mean"]
    assert (new[:, 0] >= thresholds[0]).mean() == pytest.approx(1 / PROMISE, rel=0.35)
    assert (new[:, 0] >= level).mean() > 1.8 / PROMISE


def test_simulated_streams_are_long_enough_and_affordable() -> None:
    assert num_steps_for(10) == 512 and num_steps_for(5000) == 15_000 and num_steps_for(1e6) == 20_000
