"""What a claimed job's run is predicted to take, and what it took. Knows no phase of the run but its steps.

The prediction is made once, before the first step, from a few timed slices of the run's own data; it is kept with the
job and, with the truth beside it, with the version.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from adapters.calibration import calibrate
from adapters.estimate import Estimate, RunSize, estimate, peak_memory_bytes
from adapters.memory_meter import MemoryMeter
from adapters.trainer import Trainer
from service.engine.base_model import BaseModel

COMPARED = ("tokens", "steps", "seconds", "seconds_per_step", "peak_memory_bytes")


class EstimatedRun:
    """One attempt at a run beside its estimate. `steps` and `evaluations` are timed as they are made."""

    def __init__(self, trainer: Trainer, base: BaseModel, known: Mapping[str, Any] | None = None) -> None:
        """`known` is what an earlier attempt predicted."""
        self._trainer = trainer
        self._base = base
        self._steps_before = trainer.steps_done
        self._tokens_before = trainer.trained_tokens
        self._step_seconds = self._evaluation_seconds = 0.0
        self.predicted = Estimate.from_dict(known) if known else None
        self._meter = MemoryMeter(base.device)

    def predict(self, check: Callable[[], None], *, probed: bool) -> Estimate | None:
        """What the whole run will take, at the pace of now; None when it has nothing left to do."""
        trainer = self._trainer
        if self.predicted is None and not trainer.done:
            size = RunSize.of(trainer.config, trainer.train, trainer.valid, probes=probed)
            memory = peak_memory_bytes(
                size,
                trainer.adapter.spec,
                self._base.signature,
                vocabulary=self._base.vocab_size,
                activation_bytes=self._base.activation_bytes,
                recompute=trainer.memory.recompute_layers,
            )
            self.predicted = estimate(size, memory, calibrate(trainer, check))
            self._meter = MemoryMeter(self._base.device)
        return self.predicted

    @contextmanager
    def stepping(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._step_seconds += time.monotonic() - start

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._evaluation_seconds += time.monotonic() - start

    def seconds_left(self) -> float | None:
        """By the pace of this attempt; by the estimate before it has one."""
        trainer, made = self._trainer, self._trainer.steps_done - self._steps_before
        left = trainer.num_steps - trainer.steps_done
        if made:
            return left * (self._step_seconds + self._evaluation_seconds) / made
        if self.predicted is None or self.predicted.seconds is None:
            return None
        return left * self.predicted.seconds / self.predicted.steps

    @property
    def tokens_per_second(self) -> float | None:
        """Of this attempt, evaluations included."""
        seconds = self._step_seconds + self._evaluation_seconds
        tokens = self._trainer.trained_tokens - self._tokens_before
        return tokens / seconds if tokens and seconds > 0 else None

    def compared(self) -> dict[str, Any]:
        """Prediction and truth. `seconds` is None for a run of several attempts: nobody timed the others.

        A run that stopped early made fewer steps than planned; `seconds_per_step` is comparable all the same.
        """
        trainer, made = self._trainer, self._trainer.steps_done - self._steps_before
        actual = {
            "tokens": trainer.trained_tokens,
            "steps": trainer.steps_done,
            "evaluations": len(trainer.scores),
            "seconds": None if self._steps_before else self._step_seconds + self._evaluation_seconds,
            "seconds_per_step": self._step_seconds / made if made else None,
            "peak_memory_bytes": self._meter.peak_bytes,
            "resident_growth_bytes": self._meter.resident_growth_bytes,
            "stopped_early": trainer.stopped_early,
        }
        predicted = None if self.predicted is None else self.predicted.as_dict()
        return {"predicted": predicted, "actual": actual, "ratios": _ratios(predicted or {}, actual)}


def _ratios(predicted: Mapping[str, Any], actual: Mapping[str, Any]) -> dict[str, float | None]:
    """Predicted ÷ actual; None where either is not known."""
    known = {name: predicted.get(name) is not None and actual[name] for name in COMPARED}
    return {name: predicted[name] / actual[name] if known[name] else None for name in COMPARED}


def estimate_message(found: Estimate) -> str:
    time_told = "" if found.seconds is None else f", about {_duration(found.seconds)}"
    memory = found.peak_memory_bytes / 2**20
    return f"Estimated: {found.tokens} tokens, {found.steps} steps{time_told}, peak memory {memory:.0f} MiB"


def comparison_message(compared: Mapping[str, Any]) -> str:
    """Predicted ÷ actual, per step where the run was shorter than planned."""
    names = {"seconds": "time", "seconds_per_step": "time per step", "peak_memory_bytes": "memory", "tokens": "tokens"}
    ratios = compared["ratios"]
    told = ", ".join(f"{word} x {ratios[name]:.2f}" for name, word in names.items() if ratios[name] is not None)
    early = "; the run stopped early, so compare the time per step" if compared["actual"]["stopped_early"] else ""
    return f"The estimate against the truth (predicted ÷ actual): {told}{early}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
