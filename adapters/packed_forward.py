"""One run's forwards and backwards over packs of rows, alone or beside other runs'. Knows no loss and no data.

What is learned from the logits is the objective's business, so rows of several objectives and of several adapters may
share a forward: with `shared`, they do (see `adapters.shared_forward`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from adapters.lora import Routing
from adapters.memory_budget import MemoryBudget
from adapters.packed_model import AskedRows, PackedModel, Row
from adapters.packing import bounded_slices
from adapters.shared_forward import Passage, SharedForward
from adapters.trainable import TrainRouting
from adapters.turns import Traveller

__all__ = ["PackedForward", "Row"]


class PackedForward:
    """`memory` bounds a pack, and with it the wait of whoever wants to stop between two.

    A forward that is to be differentiated is followed by `backward` of its loss, or by `abandon`.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, memory: MemoryBudget, shared: SharedForward | None = None
    ) -> None:
        self.model = model
        self.device = device
        self.memory = memory
        self._shared = shared
        self._run = shared.model if shared else PackedModel(model, device)
        self._traveller = Traveller()
        self._passage: Passage | None = None

    def packs(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows of these lengths, by index, divided into packs."""
        return bounded_slices(lengths, self.memory.max_slice_tokens)

    def __call__(self, rows: Sequence[Row], route: Routing | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [asked, vocabulary] in the model's dtype and the tokens that stand there [asked], row after row."""
        asked = AskedRows.of(rows, self.device)
        recompute = self.memory.recompute_layers
        if self._shared is None:
            return self._run([asked], route, recompute=recompute), asked.labels
        if torch.is_grad_enabled() and isinstance(route, TrainRouting) and self._passage is None:
            passage = self._shared.travel(self._traveller, asked, route, self.memory.max_slice_tokens, recompute)
            self._passage = passage
            return passage.logits, asked.labels
        on_the_way = self._passage is not None
        with self._shared.turns.alone(self._traveller, len(asked.tokens), on_the_way=on_the_way):
            return self._run([asked], route, recompute=recompute), asked.labels

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of the loss for the adapter that was forwarded."""
        loss.backward()  # type: ignore[no-untyped-call]
        passage, self._passage = self._passage, None
        if passage is not None and self._shared is not None:
            self._shared.finish(passage)

    def abandon(self) -> None:
        """There will be no backward: those who travel along must not wait for it."""
        passage, self._passage = self._passage, None
        if passage is not None and self._shared is not None:
            self._shared.withdraw(passage)

    def keep_apart(self, apart: bool) -> None:
        """Whether this run goes alone for now."""
        self._traveller.alone = apart

    def leave(self) -> None:
        """This run does something else for a while: nobody waits for it."""
        if self._shared is not None:
            self._shared.turns.leave(self._traveller)
