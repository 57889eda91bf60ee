"""Trains one adapter on a frozen base that may be serving others. Knows no job, no events and no files.

One `Trainer.step()` is one optimizer step: its batch is cut into bounded packs, each a forward and a backward, and
between two packs the caller may stop (the step then never happened). Every random choice follows from the seed and
the step's number, so the state after a step is all that an exact resume needs.

It only puts pieces together: `DataCursor` says which examples, an `Objective` what they cost, `MasterOptimizer` moves
the masters, `MemoryBudget` says how much of a step is on the device at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import nn

from adapters.corpus import Corpus
from adapters.data_cursor import DataCursor
from adapters.errors import TrainingError
from adapters.lora_weights import LoraPair, LoraWeights
from adapters.master_optimizer import MasterOptimizer
from adapters.objective import Means, Objective, measure
from adapters.packed_forward import PackedForward
from adapters.packed_loss import PackedLoss, Score
from adapters.preference import Preference
from adapters.recipe import TrainConfig, num_steps
from adapters.shared_forward import JointPassError, SharedForward
from adapters.supervised import Supervised
from adapters.trainable import TrainableLora, TrainRouting

T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """`step` counts from 1. A step whose loss or gradient was not finite is `skipped`: it changed nothing.

    `accuracy` is that of tokens, or of pairs; `margin` is the mean reward margin of pairs; `kl` the mean divergence
    from the base where that has a price.
    """

    step: int
    loss: float
    accuracy: float
    learning_rate: float
    num_tokens: int
    skipped: bool = False
    margin: float | None = None
    kl: float | None = None


class Trainer:
    """One run: history, scores and the best weights so far."""

    def __init__(
        self,
        model: nn.Module,
        adapter: TrainableLora,
        train: Corpus,
        valid: Corpus,
        config: TrainConfig,
        shared: SharedForward | None = None,
    ) -> None:
        """`adapter` is as the run finds it: a preference run takes it as its reference.

        `shared`: train beside the other runs that have it, each in a thread of its own.
        """
        self.adapter = adapter
        self.train = train
        self.valid = valid
        self.config = config
        self.device = adapter.parameters()[0].device
        self.loss = PackedLoss(model, self.device, config.max_slice_tokens, shared)
        self.memory = self.loss.forward.memory
        self.memory.recompute_layers = config.recompute_layers is True
        self.memory.may_recompute = config.recompute_layers is not False
        self.objective = _objective(config, train, self.loss.forward, config.kl_to_base)
        self.valid_objective = _objective(config, valid, self.loss.forward)
        self.cursor = DataCursor(len(self.objective), config.batch_size, config.seed)
        self.steps_per_epoch = self.cursor.steps_per_epoch
        self.num_steps = num_steps(config, len(self.objective))
        self.optimizer = MasterOptimizer(adapter.parameters(), config, self.num_steps)
        self.history: list[StepResult] = []
        self.scores: dict[int, Score] = {}
        self.best_step: int | None = None
        self.incidents: list[str] = []
        """What went wrong and was dealt with, for whoever tells of it (and clears the list); not part of the state."""
        self._best: LoraWeights | None = None
        self._prepared = False

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
        on_time = step % self.config.eval_every == 0 or step % self.steps_per_epoch == 0 or step == self.num_steps
        return step > 0 and on_time and step not in self.scores

    def step(self, between_packs: Callable[[], None] = lambda: None) -> StepResult:
        """One optimizer step. Whatever `between_packs` raises passes through and leaves no trace of the step.

        Raises:
            TrainingError: `non_finite_loss`, see `MasterOptimizer`.
            torch.OutOfMemoryError: a single example does not fit, whatever is given up for it.
        """
        self._prepare(between_packs)
        batch = self.cursor.batch(self.steps_done)
        try:
            longest = self.objective.longest(batch)
            means = self._within_memory(longest, lambda: self._accumulate(batch, between_packs))
            update = self.optimizer.apply(self.steps_done, means["loss"])
        finally:
            self.optimizer.clear()
        if update.skipped:
            self.incidents.append(
                f"Step {self.steps_done + 1} was skipped: its loss or gradient is not finite."
                f" The learning rate is now {self.optimizer.share:.3g} of the planned one, for a while."
            )
        num_tokens = self.objective.num_tokens(batch)
        result = StepResult(
            self.steps_done + 1,
            learning_rate=update.learning_rate,
            num_tokens=num_tokens,
            skipped=update.skipped,
            **means,
        )
        self.history.append(result)
        return result

    def evaluate(self, between_packs: Callable[[], None] = lambda: None) -> Score:
        """Score the validation examples, note it for this step, and keep the weights if they are the best yet."""
        self._prepare(between_packs)
        objective, everything = self.valid_objective, list(range(len(self.valid_objective)))
        route = TrainRouting(self.adapter, training=False)
        longest = objective.longest(everything)
        means = self._within_memory(longest, lambda: measure(objective, everything, route, between_packs))
        score = self.scores[self.steps_done] = Score(**means)
        if isfinite(score.loss) and (self.best_step is None or score.loss < self.scores[self.best_step].loss):
            self.best_step, self._best = self.steps_done, self.adapter.weights()
        return score

    def rehearse(self, batch: list[int], between_packs: Callable[[], None] = lambda: None) -> None:
        """Forward and backward of a batch without the update, to be timed: the run goes on to the same bits."""
        self._prepare(between_packs)
        try:
            longest = self.objective.longest(batch)
            self._within_memory(longest, lambda: self._accumulate(batch, between_packs))
        finally:
            self.optimizer.clear()

    def rehearse_scoring(self, batch: list[int], between_packs: Callable[[], None] = lambda: None) -> None:
        """Score these validation examples as `evaluate` would, and note nothing."""
        self._prepare(between_packs)
        objective, route = self.valid_objective, TrainRouting(self.adapter, training=False)
        longest = objective.longest(batch)
        self._within_memory(longest, lambda: measure(objective, batch, route, between_packs))

    def leave(self) -> None:
        """No step follows for now: runs that train beside this one need not wait for it."""
        self.loss.forward.leave()

    def best_weights(self) -> LoraWeights:
        """Those with the best validation loss; the current ones before the first evaluation."""
        return self._best or self.adapter.weights()

    def state_dict(self) -> dict[str, Any]:
        """Plain values and host tensors (copies): all that `load_state_dict` needs for an exact resume."""
        return {
            "config": _plain_config(self.config),
            "history": [asdict(result) for result in self.history],
            "scores": {step: asdict(score) for step, score in self.scores.items()},
            "best_step": self.best_step,
            "masters": _plain(self.adapter.weights()),
            "best": _plain(self._best) if self._best else None,
            "optimizer": self.optimizer.state_dict(),
            "memory": self.memory.state_dict(),
            "prepared": self._prepared,
            "objectives": [self.objective.state_dict(), self.valid_objective.state_dict()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, on the same data and base.

        Raises:
            TrainingError: `resume_mismatch`, the state belongs to a run with other settings.
        """
        if state["config"] != _plain_config(self.config):
            raise TrainingError("the saved training state belongs to other settings", code="resume_mismatch")
        self.adapter.load(self._pairs(state["masters"]))
        self._best = LoraWeights(self.adapter.spec, self._pairs(state["best"])) if state["best"] else None
        self.optimizer.load_state_dict(state["optimizer"])
        self.memory.load_state_dict(state["memory"])
        self._prepared = state["prepared"]
        for objective, saved in zip((self.objective, self.valid_objective), state["objectives"], strict=True):
            objective.load_state_dict(saved)
        self.history = [StepResult(**values) for values in state["history"]]
        self.scores = {step: Score(**values) for step, values in state["scores"].items()}
        self.best_step = state["best_step"]

    def _prepare(self, between_packs: Callable[[], None]) -> None:
        """Before the first step, while the adapter is still what the run was given."""
        if self._prepared:
            return
        start = TrainRouting(self.adapter, training=False)
        for objective in (self.objective, self.valid_objective):
            longest = objective.longest(list(range(len(objective))))
            self._within_memory(longest, lambda o=objective: o.prepare(start, between_packs))  # type: ignore[misc]
        self._prepared = True

    def _accumulate(self, batch: list[int], between_packs: Callable[[], None]) -> dict[str, float]:
        """Gradients of the whole batch's loss, pack by pack; returns what was measured."""
        route = TrainRouting(self.adapter, generator=self._generator(self.steps_done))
        divisors, means = self.objective.divisors(batch), Means()
        forward = self.loss.forward
        for pack in self.objective.packs(batch):
            try:
                result = self.objective(pack, divisors, route)
                forward.backward(result.loss)
            finally:
                forward.abandon()
            means.add(result.sums)
            between_packs()
        return means.over(divisors)

    def _within_memory(self, longest: int, work: Callable[[], T]) -> T:
        """Do the work, from its start again whenever the device runs out of memory: alone, then with smaller packs."""
        forward = self.loss.forward
        while True:
            try:
                found = work()
                forward.keep_apart(False)
                return found
            except JointPassError as error:
                forward.keep_apart(True)
                if not error.out_of_memory:
                    self.optimizer.clear()
                    continue
                change = "it is done again alone"
            except torch.OutOfMemoryError:
                tightened = self.memory.tighten(longest)
                if tightened is None:
                    raise
                change = tightened
            # Out of the handler: the traceback held the failed pack's tensors.
            self.optimizer.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.incidents.append(f"The device ran out of memory at step {self.steps_done + 1}: {change}.")

    def _generator(self, step: int) -> torch.Generator:
        """Dropout's own randomness: other threads draw from the global one."""
        return torch.Generator(self.device).manual_seed((self.config.seed << 24) + step)

    def _pairs(self, tensors: dict[str, list[torch.Tensor]]) -> dict[str, LoraPair]:
        spec = self.adapter.spec
        return {name: LoraPair(a, b, spec.scaling_of(name)) for name, (a, b) in tensors.items()}


def _objective(config: TrainConfig, corpus: Corpus, forward: PackedForward, kl_to_base: float = 0.0) -> Objective:
    if config.beta is not None:
        return Preference(corpus, forward, config.beta)
    return Supervised(corpus, forward, kl_to_base)


def _plain_config(config: TrainConfig) -> dict[str, Any]:
    """Plain values, as a saved state may hold them."""
    return {**asdict(config), "schedule": config.schedule.value}


def _plain(weights: LoraWeights) -> dict[str, list[torch.Tensor]]:
    return {name: [pair.a, pair.b] for name, pair in weights.modules.items()}
