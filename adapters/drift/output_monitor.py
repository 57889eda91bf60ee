"""Whether an adapter's answers still are what its first answers were, one answer at a time. Knows no text.

The first answers of a version are its own baseline; before there are enough, every signal is unknown. Numbers count
by their rank within the baseline, what happens or not by how much likelier it would be at other odds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapters.drift.calibration import NUM_STREAMS, calibrate, num_steps_for
from adapters.drift.cusum import CAP, MIN_SAMPLES, Cusum, EventSteps, allowance, rank_score
from adapters.drift.reading import Reading
from adapters.drift.simulation import Draws, Paths, event_paths, number_paths
from adapters.drift.state import pack, unpack
from adapters.errors import DriftReferenceError

NUMBERS = ("answer_nll", "answer_entropy", "answer_length")
EVENTS = ("finish_length", "valid_json", "refusal")
SIGNALS = (*NUMBERS, *EVENTS)
BASELINE_SIZE = 200
MIN_MEASURED = BASELINE_SIZE // 2
"""A signal that fewer answers of the baseline have stays unknown."""


@dataclass(frozen=True)
class _Baseline:
    """Of a whole baseline, what each measured signal is compared with."""

    numbers: Mapping[str, NDArray[np.float64]]
    """Of the answers that have them all: row by row of one answer."""
    ascending: Mapping[str, NDArray[np.float64]]
    """The same, each sorted."""
    events: Mapping[str, tuple[int, int]]
    """How often it happened, and of how many answers."""

    @classmethod
    def of(cls, rows: NDArray[np.float64]) -> _Baseline:
        """rows: [BASELINE_SIZE, signals], NaN where nothing was measured."""
        columns = dict(zip(SIGNALS, rows.T, strict=True))
        kept = {name: values for name, values in columns.items() if np.isfinite(values).sum() >= MIN_MEASURED}
        whole = np.isfinite([kept[name] for name in NUMBERS if name in kept]).all(axis=0)
        numbers = {name: kept[name][whole] for name in NUMBERS if name in kept and whole.sum() >= MIN_MEASURED}
        return cls(
            numbers,
            {name: np.sort(values) for name, values in numbers.items()},
            {name: (int(np.nansum(kept[name])), int(np.isfinite(kept[name]).sum())) for name in EVENTS if name in kept},
        )


class OutputMonitor:
    """The tests of one version's answers, with one promised `run_length` for all of them together.

    Between the last answer of the baseline and `calibrate`, answers are not counted. `state` continues where another
    monitor stood, with its run length and seed.
    """

    def __init__(self, run_length: float, seed: int, state: bytes | None = None) -> None:
        self._run_length, self._seed = run_length, seed
        self._rows: list[list[float]] = []
        self._baseline: _Baseline | None = None
        self._thresholds: dict[str, float] = {}
        self._sums: dict[str, Cusum] = {}
        self._samples = dict.fromkeys(SIGNALS, 0)
        self._lots = np.random.default_rng(seed)
        if state is not None:
            self._restore(state)

    @property
    def signals(self) -> tuple[str, ...]:
        return SIGNALS

    @property
    def needs_calibration(self) -> bool:
        """The baseline is whole and has no thresholds yet."""
        return len(self._rows) == BASELINE_SIZE and self._baseline is None

    def calibrate(self, check: Callable[[], None]) -> None:
        """Thresholds for the baseline: seconds of CPU work. `check` is called often and may raise."""
        assert self.needs_calibration
        baseline = _Baseline.of(np.array(self._rows))
        rng = np.random.default_rng([self._seed, BASELINE_SIZE])
        paths = _paths(rng, baseline, num_steps_for(self._run_length), check)
        shares = dict.fromkeys(paths, 1 / max(len(paths), 1))
        self._use(baseline, calibrate(paths, shares, self._run_length, check) if paths else {})

    def observe(self, signals: Mapping[str, float | None]) -> tuple[Reading, ...]:
        """What was not measured is left out or None; a signal that the baseline hardly has stays unknown. Raises
        DriftReferenceError for one that does not exist."""
        if unknown := signals.keys() - set(SIGNALS):
            raise DriftReferenceError(f"{sorted(unknown)[0]} is no signal of an answer; there are {', '.join(SIGNALS)}")
        given = {name: float(value) for name, value in signals.items() if value is not None and np.isfinite(value)}
        if self._baseline is not None:
            for name in given.keys() & self._thresholds.keys():
                self._add(self._baseline, name, given[name])
        elif len(self._rows) < BASELINE_SIZE:
            self._rows.append([given.get(name, float("nan")) for name in SIGNALS])
            for name in given:
                self._samples[name] += 1
        return self.readings()

    def readings(self) -> tuple[Reading, ...]:
        """As after the last observation."""
        return tuple(map(self._reading, SIGNALS))

    def reset(self, signal: str | None = None) -> None:
        """Begin again against the same baseline; None: all signals. Raises KeyError for an unknown signal."""
        if signal is not None and signal not in SIGNALS:
            raise KeyError(signal)
        for name, threshold in self._thresholds.items():
            if signal in (None, name):
                self._sums[name], self._samples[name] = Cusum(CAP * threshold), 0

    def state_dict(self) -> bytes:
        facts = {
            "lots": self._lots.bit_generator.state,
            "samples": self._samples,
            "sums": {name: [one.up, one.down] for name, one in self._sums.items()},
            "thresholds": self._thresholds if self._baseline is not None else None,
        }
        return pack("output", facts, {"rows": np.array(self._rows, dtype=np.float64).reshape(-1, len(SIGNALS))})

    def _restore(self, state: bytes) -> None:
        facts, arrays = unpack("output", state)
        rows = arrays["rows"]
        if rows.shape[1:] != (len(SIGNALS),) or facts["samples"].keys() != set(SIGNALS):
            raise DriftReferenceError("the kept state is of other signals; begin again without it")
        self._rows = rows.tolist()
        self._lots.bit_generator.state = facts["lots"]
        if facts["thresholds"] is not None:
            self._use(_Baseline.of(rows), facts["thresholds"])
        self._samples = {name: facts["samples"][name] for name in SIGNALS}
        for name, (up, down) in facts["sums"].items():
            self._sums[name].up, self._sums[name].down = up, down

    def _use(self, baseline: _Baseline, thresholds: Mapping[str, float]) -> None:
        self._thresholds = dict(thresholds)
        self._sums = {name: Cusum(CAP * threshold) for name, threshold in thresholds.items()}
        self._samples = dict.fromkeys(SIGNALS, 0)
        self._baseline = baseline  # last: from here on answers are compared

    def _add(self, baseline: _Baseline, name: str, value: float) -> None:
        self._samples[name] += 1
        if name in baseline.events:
            steps, happened = EventSteps.of(*baseline.events[name]), int(value != 0)
            self._sums[name].add(steps.more[happened], steps.less[happened])
        else:
            values = baseline.ascending[name]
            score, allowed = rank_score(values, value, self._lots.random()), allowance(len(values))
            self._sums[name].add(score - allowed, -score - allowed)

    def _reading(self, name: str) -> Reading:
        samples = self._samples[name]
        if name not in self._thresholds or samples < MIN_SAMPLES:
            return Reading(name, None, None, samples, False)
        statistic, threshold = self._sums[name].statistic, self._thresholds[name]
        return Reading(name, statistic, threshold, samples, statistic >= threshold)


def _paths(
    rng: np.random.Generator, baseline: _Baseline, num_steps: int, check: Callable[[], None]
) -> dict[str, Paths]:
    """By signal. Numbers of one answer are drawn together, events as if they were independent: where they are not,
    false alarms coincide, and are rarer than promised."""
    found: dict[str, Paths] = {}
    if baseline.numbers:
        num_pool = len(next(iter(baseline.numbers.values())))
        draws = Draws.of(rng, num_pool, NUM_STREAMS, num_steps)
        found |= number_paths(rng, baseline.numbers, draws, allowance(num_pool))
    for name, (num_happened, num) in baseline.events.items():
        check()
        found[name] = event_paths(rng, num_happened, num, NUM_STREAMS, num_steps)
    return found
