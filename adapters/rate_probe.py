"""Which of three learning rates suits a run: three short runs from the same weights on the same batches.

Each is the run in small, with the run's own schedule compressed; the lowest validation loss, averaged over the last
evaluations, wins. Deterministic by seed. Knows no job and no files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any, Protocol

from adapters.errors import TrainingError
from adapters.recipe import TrainConfig, auto_probe_steps
from adapters.trainer import Trainer

SPREAD = 3.0
"""On a 7 M base 2e-3 learned where 6e-4 and 5e-3 did not: a factor of three tells them apart."""
NUM_EVALUATIONS, NUM_SMOOTHED = 5, 3
MAX_VALIDATION = 64


class MakeTrainer(Protocol):
    """A run with these settings from the run's own starting weights, judged on some of its validation examples."""

    def __call__(self, config: TrainConfig, max_valid: int | None = None) -> Trainer: ...


@dataclass(frozen=True)
class ProbeResult:
    """`losses[i]`: smoothed validation loss of `rates[i]`; None where it did not stay finite."""

    rates: tuple[float, ...]
    losses: tuple[float | None, ...]
    num_steps: int
    chosen: float


class RateProbe:
    """`step` until `done`, then `result`. The state between two steps is all that a resume needs."""

    def __init__(self, make: MakeTrainer, config: TrainConfig, num_steps: int) -> None:
        """`config.learning_rate` is the middle one; `num_steps` is the length of the whole run."""
        middle = config.learning_rate
        self.rates = (middle / SPREAD, middle, middle * SPREAD)
        self.losses: list[float] = []
        self.prepared: dict[str, Any] = {}
        """What the objective found at the starting weights: the same for every rate, and for the run itself."""
        self._make = make
        self._config = replace(config, max_steps=auto_probe_steps(num_steps), patience=None)
        self._trainer: Trainer | None = None

    @property
    def done(self) -> bool:
        return len(self.losses) == len(self.rates)

    @property
    def num_steps(self) -> int:
        """Of each rate's run."""
        return self._config.max_steps or 0

    def step(self, between_packs: Callable[[], None] = lambda: None) -> None:
        """One optimizer step of one rate's run, and its evaluation where one is due."""
        trainer = self._trainer = self._trainer or self._next()
        try:
            if not trainer.evaluation_due:  # it is due at once where a run was interrupted in its evaluation
                trainer.step(between_packs)
            if trainer.evaluation_due:
                trainer.evaluate(between_packs)
            if not trainer.done:
                return
            last = [trainer.scores[step].loss for step in sorted(trainer.scores)[-NUM_SMOOTHED:]]
            loss = sum(last) / len(last)
        except TrainingError:  # this rate is too high
            loss = inf
        self.losses.append(loss if isfinite(loss) else inf)
        self.prepared = trainer.objective.state_dict()
        self._trainer = None

    def result(self) -> ProbeResult:
        """Raises TrainingError (`non_finite_loss`) when none of the rates kept the loss finite."""
        assert self.done
        best = min(range(len(self.rates)), key=lambda index: self.losses[index])
        if not isfinite(self.losses[best]):
            raise TrainingError(
                f"none of the learning rates {', '.join(f'{rate:.2g}' for rate in self.rates)} keeps the loss finite:"
                " give a lower learning_rate",
                code="non_finite_loss",
                param="hyperparameters.learning_rate",
            )
        losses = tuple(loss if isfinite(loss) else None for loss in self.losses)
        return ProbeResult(self.rates, losses, self.num_steps, self.rates[best])

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer.state_dict() if self._trainer else None
        return {"losses": list(self.losses), "prepared": self.prepared, "trainer": trainer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.prepared = list(state["losses"]), state["prepared"]
        if state["trainer"] is not None:
            self._trainer = self._next()
            self._trainer.load_state_dict(state["trainer"])

    def _next(self) -> Trainer:
        rate = self.rates[len(self.losses)]
        every = max(1, self.num_steps // NUM_EVALUATIONS)
        trainer = self._make(replace(self._config, learning_rate=rate, eval_every=every), MAX_VALIDATION)
        if self.losses:
            trainer.objective.load_state_dict(self.prepared)
        return trainer
