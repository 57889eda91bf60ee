"""The loss of token sequences on a model, computed in bounded packs under any routing. Knows no optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from adapters.corpus import Corpus
from adapters.lora import Routing
from adapters.memory_budget import MemoryBudget
from adapters.objective import measure
from adapters.packed_forward import PackedForward
from adapters.shared_forward import SharedForward
from adapters.supervised import Supervised


@dataclass(frozen=True)
class Score:
    """Mean negative log likelihood (nats) and share of tokens guessed right, over learned tokens.

    Of pairs: mean preference loss, share of pairs told apart, and the mean reward `margin`.
    """

    loss: float
    accuracy: float
    margin: float | None = None


class PackedLoss:
    """`max_tokens` bounds a pack: the memory it takes, and the wait of whoever wants to stop between two.

    With `shared`, packs are forwarded in turns with other runs', or together with them.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, max_tokens: int, shared: SharedForward | None = None
    ) -> None:
        self.forward = PackedForward(model, device, MemoryBudget(max_tokens), shared)

    def __call__(self, corpus: Corpus, pack: list[int], route: Routing | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss and number of right guesses over the learned tokens of one pack, both scalars."""
        sums = Supervised(corpus, self.forward)(pack, {"loss": 1}, route).sums
        return sums["loss"], sums["accuracy"]

    @torch.no_grad()
    def per_sequence(
        self, corpus: Corpus, route: Routing | None, between_packs: Callable[[], None] = lambda: None
    ) -> tuple[list[float], list[int]]:
        """Of each sequence of a corpus: the summed loss, and of how many learned tokens it is the sum."""
        nats, counts = [0.0] * len(corpus), [0] * len(corpus)
        for pack in self.forward.packs(corpus.lengths.tolist()):
            rows = [corpus.sequence(index) for index in pack]
            logits, labels = self.forward(rows, route)
            losses = functional.cross_entropy(logits.float(), labels, reduction="none").double()
            sizes = [int(learned[1:].sum()) for _, learned in rows]
            for index, size, part in zip(pack, sizes, torch.split(losses, sizes), strict=True):
                nats[index], counts[index] = float(part.sum()), size
            between_packs()
        return nats, counts

    def score(self, corpus: Corpus, route: Routing | None, between_packs: Callable[[], None] = lambda: None) -> Score:
        """Over all sequences of a corpus, without gradients."""
        return Score(**measure(Supervised(corpus, self.forward), list(range(len(corpus))), route, between_packs))
