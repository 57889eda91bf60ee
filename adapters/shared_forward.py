"""One forward and one backward through the base for packs of several runs: each run in its own thread.

A run hands in its pack and gets its own logits, cut off from the joint graph. It computes its own loss down to them
and hands in their gradient; when everybody has (or has withdrawn), one backward through the base fills all masters'
gradients. Runs share no parameter, so their gradients do not mix. On CPU a run gets the bits that it would get alone
(see `JointPack` and `SegmentRouting`), provided that a product's rows do not depend on their number: so it is for
bfloat16, and not for float32. Runs in float32 on CPU therefore only take turns.

Whatever fails in company is done again alone (`JointPassError`), so that nobody pays for another's mistake.
Knows no optimizer, no data and no job.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from adapters.packed_model import AskedRows, PackedModel
from adapters.segment_routing import SegmentRouting
from adapters.trainable import TrainRouting
from adapters.turns import Traveller, Turns, Wish


@dataclass(frozen=True)
class Failure:
    """Of a pass in company."""

    reason: str
    out_of_memory: bool = False


class JointPassError(Exception):
    """A pass in company failed: the step has to be done again, alone."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.out_of_memory = failure.out_of_memory


@dataclass(eq=False)
class _Pack(Wish):
    """A wish with what is to be computed, and what came of it."""

    asked: AskedRows
    route: TrainRouting
    recompute: bool
    passage: Passage | None = None
    failure: Failure | None = None


class Passage:
    """One run's part of a joint pass. `logits`: [asked, vocabulary], a leaf that wants a gradient."""

    def __init__(self, journey: _Journey, route: TrainRouting, logits: torch.Tensor) -> None:
        self.journey = journey
        self.route = route
        self.logits = logits.detach().requires_grad_()

    @property
    def gradient(self) -> torch.Tensor:
        return torch.zeros_like(self.logits) if self.logits.grad is None else self.logits.grad


class _Journey:
    """A joint forward that waits for its backward."""

    def __init__(self, packs: Sequence[_Pack]) -> None:
        self.started_at = time.monotonic()
        self.num_tokens = sum(pack.num_tokens for pack in packs)
        self.logits: torch.Tensor | None = None
        self.passages: list[Passage] = []
        self.pending: set[Passage] = set()
        self.withdrawn: set[Passage] = set()
        self.running = self.done = False
        self.failure: Failure | None = None
        self._packs = packs

    def forward(self, logits: torch.Tensor) -> None:
        """logits: of all packs, [asked, vocabulary]."""
        self.logits = logits
        parts = torch.split(logits.detach(), [len(pack.asked.positions) for pack in self._packs])
        self.passages = [Passage(self, pack.route, part) for pack, part in zip(self._packs, parts, strict=True)]
        self.pending = set(self.passages)
        self._packs = ()


class SharedForward:
    """Shared by all runs on one base. `together`: None decides by what keeps a run's bits."""

    def __init__(self, model: nn.Module, device: torch.device, *, together: bool | None = None) -> None:
        self.model = PackedModel(model, device)
        self._device = device
        self.turns = Turns(together=keeps_rows(model, device) if together is None else together)

    def travel(
        self, traveller: Traveller, asked: AskedRows, route: TrainRouting, max_tokens: int, recompute: bool
    ) -> Passage:
        """Forward this pack, perhaps beside others. Follow it by `finish` or `withdraw`.

        Raises:
            JointPassError: it failed in company.
            Exception: whatever the forward raises, alone.
        """
        num_tokens = len(asked.tokens)
        wish = _Pack(traveller, num_tokens, max_tokens, True, asked, route, recompute)
        group = self.turns.wait_for(wish)
        if group is not None:
            self._forward([pack for pack in group if isinstance(pack, _Pack)])
        if wish.failure is not None:
            raise JointPassError(wish.failure)
        assert wish.passage is not None
        return wish.passage

    def finish(self, passage: Passage) -> None:
        """The logits have their gradient; returns when the masters have theirs. Raises as `travel` does."""
        journey, changed = passage.journey, self.turns.changed
        with changed:
            journey.pending.discard(passage)
            changed.notify_all()
            while not journey.done:
                if journey.pending or journey.running or self.turns.busy:
                    changed.wait()
                    continue
                journey.running = True
                try:
                    with self.turns.device():
                        self._backward(journey)
                finally:
                    self._close(journey)
        if journey.failure is not None:
            raise JointPassError(journey.failure)

    def withdraw(self, passage: Passage) -> None:
        """This run gives up; the others go on without it."""
        journey = passage.journey
        with self.turns.changed:
            journey.pending.discard(passage)
            journey.withdrawn.add(passage)
            if len(journey.withdrawn) == len(journey.passages):
                self._close(journey)
            self.turns.changed.notify_all()

    def _forward(self, packs: list[_Pack]) -> None:
        """Everybody gets a passage, or hears why not. What fails alone is raised here: its only member leads."""
        failure: Failure | None = Failure("interrupted")
        try:
            journey = _Journey(packs)
            journey.forward(self._logits(packs))
            failure = None
        except Exception as error:
            if len(packs) == 1:
                raise
            failure = self._failed(error, journey)
        finally:
            with self.turns.changed:
                for pack, passage in zip(packs, journey.passages, strict=False):
                    pack.passage = passage
                for pack in packs:
                    pack.failure, pack.done = failure, True
                if failure is None:
                    self.turns.opened()
                self.turns.release()

    def _logits(self, packs: list[_Pack]) -> torch.Tensor:
        asked, routes = [pack.asked for pack in packs], [pack.route for pack in packs]
        route: TrainRouting | SegmentRouting = routes[0]
        if len(packs) > 1:
            rows, head_rows = [len(one.tokens) for one in asked], self.model.head_rows(asked)
            batched = self._device.type == "cuda" and min(head_rows) > 0
            route = SegmentRouting(routes, rows, head_rows, batched=batched)
        return self.model(asked, route, recompute=any(pack.recompute for pack in packs))

    def _backward(self, journey: _Journey) -> None:
        """Gradients for all who have not withdrawn, and for nobody else."""
        here = [passage for passage in journey.passages if passage not in journey.withdrawn]
        masters = [master for passage in here for master in passage.route.adapter.parameters()]
        gradients = [passage.gradient for passage in journey.passages]
        journey.failure = Failure("interrupted")
        try:
            assert journey.logits is not None
            torch.autograd.backward(journey.logits, torch.cat(gradients), inputs=masters)
            journey.failure = None
        except Exception as error:
            if len(journey.passages) == 1:
                raise
            journey.failure = self._failed(error, journey)

    def _close(self, journey: _Journey) -> None:
        journey.logits = None
        journey.done = True
        self.turns.closed(time.monotonic() - journey.started_at)

    def _failed(self, error: Exception, journey: _Journey) -> Failure:
        """What the members are told; not the error itself, whose traceback holds the pass's tensors."""
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if out_of_memory:
            most = self.turns.max_tokens
            self.turns.max_tokens = min(journey.num_tokens, most or journey.num_tokens) // 2
        return Failure(type(error).__name__, out_of_memory)


def keeps_rows(model: nn.Module, device: torch.device) -> bool:
    """Whether a row's products have the same bits beside other rows. On CUDA nothing is promised to the bit anyway."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    return device.type != "cpu" or all(weight.dtype == torch.bfloat16 for weight in matrices)
