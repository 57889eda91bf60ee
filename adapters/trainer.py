"""Trains one adapter on a frozen base that may be serving others. Knows no job, no events and no files.

One `Trainer.step()` is one optimizer step: its batch is cut into bounded packs, each a forward and a backward, and
between two packs the caller may stop (the step then never happened). Every random choice follows from the seed and
the step's number, so the state after a step is all that an exact resume needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import torch
from torch import nn

from adapters.corpus import Corpus
from adapters.errors import TrainingError
from adapters.packed_loss import PackedLoss, Score, count_learned
from adapters.peft_format import LoraPair, LoraWeights
from adapters.recipe import TrainConfig, learning_rate_factor, steps_per_epoch
from adapters.trainable import TrainableLora, TrainRouting


@dataclass(frozen=True)
class StepResult:
    """`step` counts from 1. A step whose loss or gradient was not finite is `skipped`: it changed nothing."""

    step: int
    loss: float
    accuracy: float
    learning_rate: float
    num_tokens: int
    skipped: bool = False


class Trainer:
    """Owns the masters' optimizer, the data cursor and the best weights so far."""

    def __init__(
        self, model: nn.Module, adapter: TrainableLora, train: Corpus, valid: Corpus, config: TrainConfig
    ) -> None:
        self.adapter = adapter
        self.train = train
        self.valid = valid
        self.config = config
        self.device = adapter.parameters()[0].device
        self.loss = PackedLoss(model, self.device, config.max_slice_tokens)
        self.optimizer = torch.optim.AdamW(
            adapter.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.steps_per_epoch = steps_per_epoch(len(train), config.batch_size)
        self.num_steps = self.steps_per_epoch * config.num_epochs
        self.history: list[StepResult] = []
        self.scores: dict[int, Score] = {}
        self.best_step: int | None = None
        self._best: LoraWeights | None = None
        self._num_bad_steps = 0

    @property
    def steps_done(self) -> int:
        return len(self.history)

    @property
    def trained_tokens(self) -> int:
        return sum(result.num_tokens for result in self.history)

    @property
    def stopped_early(self) -> bool:
        """The last `patience` evaluations brought no better validation loss."""
        if self.config.patience is None or self.best_step is None:
            return False
        return sum(step > self.best_step for step in self.scores) >= self.config.patience

    @property
    def done(self) -> bool:
        return self.steps_done >= self.num_steps or self.stopped_early

    @property
    def evaluation_due(self) -> bool:
        """After every `eval_every` steps, at the end of every epoch and of the run; once per step."""
        step = self.steps_done
        on_time = step % self.config.eval_every == 0 or step % self.steps_per_epoch == 0
        return step > 0 and on_time and step not in self.scores

    def step(self, between_packs: Callable[[], None] = lambda: None) -> StepResult:
        """One optimizer step. Whatever `between_packs` raises passes through and leaves no trace of the step.

        Raises:
            TrainingError: `non_finite_loss`, after `max_bad_steps` bad steps in a row.
        """
        batch = self._batch(self.steps_done)
        num_learned = count_learned(self.train, batch)
        generator = self._generator(self.steps_done)
        total_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        num_right = torch.zeros((), dtype=torch.int64, device=self.device)
        try:
            for pack in self.loss.packs(self.train, batch):
                loss, right = self.loss(self.train, pack, TrainRouting(self.adapter, generator=generator))
                # Divided by all learned tokens of the step: means of packs would weigh short packs too much.
                (loss / num_learned).backward()  # type: ignore[no-untyped-call]
                total_loss += loss.detach()
                num_right += right
                between_packs()
            result = self._apply(
                total_loss.item() / num_learned, num_right.item() / num_learned, self._num_tokens(batch)
            )
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self.history.append(result)
        return result

    def evaluate(self, between_packs: Callable[[], None] = lambda: None) -> Score:
        """Score the validation examples, note it for this step, and keep the weights if they are the best yet."""
        score = self.loss.score(self.valid, TrainRouting(self.adapter, training=False), between_packs)
        self.scores[self.steps_done] = score
        if isfinite(score.loss) and (self.best_step is None or score.loss < self.scores[self.best_step].loss):
            self.best_step, self._best = self.steps_done, self.adapter.weights()
        return score

    def best_weights(self) -> LoraWeights:
        """Those with the best validation loss; the current ones before the first evaluation."""
        return self._best or self.adapter.weights()

    def state_dict(self) -> dict[str, Any]:
        """Plain values and host tensors (copies): all that `load_state_dict` needs for an exact resume."""
        return {
            "config": asdict(self.config),
            "history": [asdict(result) for result in self.history],
            "scores": {step: asdict(score) for step, score in self.scores.items()},
            "best_step": self.best_step,
            "num_bad_steps": self._num_bad_steps,
            "masters": _plain(self.adapter.weights()),
            "best": _plain(self._best) if self._best else None,
            "optimizer": _to_host(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, on the same data and base.

        Raises:
            TrainingError: `resume_mismatch`, the state belongs to a run with other settings.
        """
        if state["config"] != asdict(self.config):
            raise TrainingError("the saved training state belongs to other settings", code="resume_mismatch")
        self.adapter.load(self._pairs(state["masters"]))
        self._best = LoraWeights(self.adapter.spec, self._pairs(state["best"])) if state["best"] else None
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [StepResult(**values) for values in state["history"]]
        self.scores = {step: Score(**values) for step, values in state["scores"].items()}
        self.best_step = state["best_step"]
        self._num_bad_steps = state["num_bad_steps"]

    def _batch(self, step: int) -> list[int]:
        """Which sequences step number `step` learns from: an epoch is one shuffle of all, by seed."""
        epoch, position = divmod(step, self.steps_per_epoch)
        shuffle = torch.Generator().manual_seed((self.config.seed << 16) + epoch)
        order = torch.randperm(len(self.train), generator=shuffle)
        start = position * self.config.batch_size
        return order[start : start + self.config.batch_size].tolist()

    def _generator(self, step: int) -> torch.Generator:
        """Dropout's own randomness: other threads draw from the global one."""
        return torch.Generator(self.device).manual_seed((self.config.seed << 24) + step)

    def _num_tokens(self, batch: list[int]) -> int:
        return int(self.train.lengths[batch].sum())

    def _apply(self, loss: float, accuracy: float, num_tokens: int) -> StepResult:
        """Clip, set the learning rate and move the masters, unless something is not finite."""
        norm = nn.utils.clip_grad_norm_(self.adapter.parameters(), self.config.max_grad_norm)
        skipped = not (isfinite(loss) and isfinite(norm.item()))
        self._num_bad_steps = self._num_bad_steps + 1 if skipped else 0
        if self._num_bad_steps >= self.config.max_bad_steps:
            raise TrainingError(
                f"the loss is not finite since step {self.steps_done + 2 - self._num_bad_steps}:"
                " try a lower learning rate",
                code="non_finite_loss",
            )
        share = learning_rate_factor(self.steps_done, self.num_steps, self.config.warmup_ratio)
        learning_rate = self.config.learning_rate * share
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        return StepResult(self.steps_done + 1, loss, accuracy, learning_rate, num_tokens, skipped)

    def _pairs(self, tensors: dict[str, list[torch.Tensor]]) -> dict[str, LoraPair]:
        spec = self.adapter.spec
        return {name: LoraPair(a, b, spec.scaling_of(name)) for name, (a, b) in tensors.items()}


def _plain(weights: LoraWeights) -> dict[str, list[torch.Tensor]]:
    return {name: [pair.a, pair.b] for name, pair in weights.modules.items()}


def _to_host(value: Any) -> Any:
    """A deep copy with every tensor in host memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_host(item) for item in value]
    return copy.copy(value)
