"""Moves one adapter's masters: AdamW, clipping, the learning rate over time, and patience with losses that explode.

Knows gradients, not where they come from.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import nn

from adapters.errors import TrainingError
from adapters.recipe import TrainConfig, learning_rate_factor

CALM_STEPS = 10
"""Good steps in a row after which a lowered learning rate is doubled again."""
MIN_SHARE = 1 / 256
"""Of the planned learning rate: a run that explodes even here is given up."""


class Update(NamedTuple):
    learning_rate: float
    skipped: bool


class MasterOptimizer:
    """A step whose loss or gradient is not finite changes no master; each halves the learning rate for a while."""

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainConfig, num_steps: int) -> None:
        self._parameters = list(parameters)
        self._config = config
        self._num_steps = num_steps
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._num_bad_steps = 0
        self._num_good_steps = 0
        self.share = 1.0
        """Of the planned learning rate."""

    def apply(self, step: int, loss: float) -> Update:
        """Use the gradients at step number `step` (counted from 0), whose loss was this.

        Raises:
            TrainingError: `non_finite_loss`, after `max_bad_steps` bad steps in a row, or too many in all.
        """
        norm = nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm)
        finite = isfinite(loss) and isfinite(norm.item())
        if not finite:
            self._note_bad(step)
        factor = learning_rate_factor(self._config.schedule, step, self._num_steps, self._config.warmup_ratio)
        learning_rate = self._config.learning_rate * factor * self.share
        if finite:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            self._note_good()
        return Update(learning_rate, skipped=not finite)

    def clear(self) -> None:
        """Forget all gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and host tensors (copies)."""
        return {
            "adamw": _to_host(self._optimizer.state_dict()),
            "num_bad_steps": self._num_bad_steps,
            "num_good_steps": self._num_good_steps,
            "share": self.share,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["adamw"])
        self._num_bad_steps, self._num_good_steps = state["num_bad_steps"], state["num_good_steps"]
        self.share = state["share"]

    def _note_bad(self, step: int) -> None:
        self._num_bad_steps += 1
        self._num_good_steps = 0
        self.share /= 2
        if self._num_bad_steps >= self._config.max_bad_steps:
            raise TrainingError(
                f"the loss is not finite since step {step + 2 - self._num_bad_steps}: try a lower learning rate",
                code="non_finite_loss",
            )
        if self.share < MIN_SHARE:
            raise TrainingError(
                f"the loss is not finite at step {step + 1}, even at 1/{round(1 / MIN_SHARE)} of the learning rate:"
                " try a lower learning rate, and look for odd examples",
                code="non_finite_loss",
            )

    def _note_good(self) -> None:
        self._num_bad_steps = 0
        self._num_good_steps += 1
        if self._num_good_steps >= CALM_STEPS and self.share < 1:
            self.share, self._num_good_steps = self.share * 2, 0


def _to_host(value: Any) -> Any:
    """A deep copy with every tensor in host memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_host(item) for item in value]
    return copy.copy(value)
