"""Whether a stream of prompts still looks like its reference, one prompt at a time. Knows no tenant and no clock.

All its tests share one promise: without drift, `reference.run_length` prompts are observed on average until the first
alarm of any of them. Nothing is latched: a reading says how it is after this prompt; who acts on it remembers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from adapters.drift.cusum import CAP, MIN_SAMPLES, Cusum, rank_score
from adapters.drift.mmd import SlidingMmd
from adapters.drift.output_monitor import OutputMonitor
from adapters.drift.reading import Reading
from adapters.drift.reference import DriftReference
from adapters.drift.state import pack, unpack
from adapters.errors import DriftReferenceError

__all__ = ["EMBEDDING", "InputMonitor", "OutputMonitor", "Reading"]

EMBEDDING = "prompt_embedding"


class InputMonitor:
    """The tests of one stream against `reference`. `state` continues where another monitor of it stood."""

    def __init__(self, reference: DriftReference, state: bytes | None = None) -> None:
        self._reference = reference
        self._lots = np.random.default_rng(0)
        self._mmd = self._new_mmd()
        self._sums = {name: self._new_sum(name) for name in reference.scalars}
        self._samples = dict.fromkeys(reference.scalars, 0)
        if state is not None:
            self._restore(state)

    @property
    def signals(self) -> tuple[str, ...]:
        return (EMBEDDING, *self._reference.scalars)

    def observe(self, embedding: NDArray[np.float32], scalars: Mapping[str, float]) -> tuple[Reading, ...]:
        """embedding: [d], of the reference's basis. A scalar that is not given is not observed. Raises
        DriftReferenceError for a vector of another size or one that is not finite."""
        expected = self._reference.mean.shape
        if embedding.shape != expected or not np.isfinite(embedding).all():
            raise DriftReferenceError(f"an embedding has to be a finite vector of {expected[0]} numbers")
        readings = [self._window_reading(self._mmd.observe(self._reference.project(embedding)))]
        for name in self._reference.scalars:
            if name in scalars:
                self._add(name, scalars[name])
            readings.append(self._scalar_reading(name))
        return tuple(readings)

    def readings(self) -> tuple[Reading, ...]:
        """As after the last observation."""
        return (self._window_reading(self._mmd.statistics()), *map(self._scalar_reading, self._reference.scalars))

    def reset(self, signal: str | None = None) -> None:
        """Forget what was observed, of one signal or of all, and begin again. Raises KeyError for an unknown signal."""
        if signal is not None and signal not in self.signals:
            raise KeyError(signal)
        if signal in (None, EMBEDDING):
            self._mmd = self._new_mmd()
        for name in self._reference.scalars:
            if signal in (None, name):
                self._sums[name], self._samples[name] = self._new_sum(name), 0

    def state_dict(self) -> bytes:
        facts = {
            "observed": self._mmd.num_observed,
            "lots": self._lots.bit_generator.state,
            "sums": {name: [self._samples[name], one.up, one.down] for name, one in self._sums.items()},
        }
        return pack("input", facts, {"points": self._mmd.last_points()})

    def _restore(self, state: bytes) -> None:
        facts, arrays = unpack("input", state)
        points, sums = arrays["points"], facts["sums"]
        if points.shape[1] != self._reference.points.shape[1] or sums.keys() != self._sums.keys():
            raise DriftReferenceError("the kept state belongs to another reference; begin again without it")
        self._mmd.restore(points, facts["observed"])
        self._lots.bit_generator.state = facts["lots"]
        for name, (samples, up, down) in sums.items():
            self._samples[name], self._sums[name].up, self._sums[name].down = samples, up, down

    def _new_mmd(self) -> SlidingMmd:
        return SlidingMmd(self._reference.points, self._reference.bandwidth, sorted(self._reference.thresholds))

    def _new_sum(self, name: str) -> Cusum:
        return Cusum(cap=CAP * self._reference.scalars[name].threshold)

    def _add(self, name: str, value: float) -> None:
        scalar = self._reference.scalars[name]
        score = rank_score(scalar.values, value, self._lots.random())
        self._sums[name].add(score - scalar.allowance, -score - scalar.allowance)
        self._samples[name] += 1

    def _window_reading(self, statistics: Mapping[int, float]) -> Reading:
        """That of the window which is nearest to its threshold, or furthest above."""
        samples, found = self._mmd.num_observed, None
        for window, statistic in statistics.items():
            thresholds = self._reference.thresholds[window]
            threshold = float(thresholds[min(samples - window, len(thresholds) - 1)])
            if found is None or statistic / threshold > found[0] / found[1]:
                found = (statistic, threshold)
        if found is None:
            return Reading(EMBEDDING, None, None, samples, False)
        return Reading(EMBEDDING, *found, samples, found[0] >= found[1])

    def _scalar_reading(self, name: str) -> Reading:
        samples, threshold = self._samples[name], self._reference.scalars[name].threshold
        if samples < MIN_SAMPLES:
            return Reading(name, None, None, samples, False)
        statistic = self._sums[name].statistic
        return Reading(name, statistic, threshold, samples, statistic >= threshold)
