"""The loss of token sequences on a model, computed in bounded packs under any routing. Knows no optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from adapters.corpus import Corpus
from adapters.lora import Routing, routing
from adapters.packing import bounded_slices, packed_sequences


@dataclass(frozen=True)
class Score:
    """Mean negative log likelihood (nats) and share of tokens guessed right, over learned tokens."""

    loss: float
    accuracy: float


class PackedLoss:
    """`max_tokens` bounds a pack: the memory it takes, and the wait of whoever wants to stop between two."""

    def __init__(self, model: nn.Module, device: torch.device, max_tokens: int) -> None:
        self.model = model
        self.device = device
        self.max_tokens = max_tokens
        self._takes_positions = "logits_to_keep" in inspect.signature(model.forward).parameters

    def packs(self, corpus: Corpus, indices: list[int]) -> list[list[int]]:
        """The sequences at `indices`, divided into packs."""
        slices = bounded_slices(corpus.lengths[indices].tolist(), self.max_tokens)
        return [[indices[position] for position in part] for part in slices]

    def __call__(self, corpus: Corpus, pack: list[int], route: Routing | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss and number of right guesses over the learned tokens of one pack, both scalars.

        Logits are computed for positions whose next token is learned, and no others: in small models they cost
        more than a layer.
        """
        sequences = [corpus.sequence(index) for index in pack]
        tokens = torch.cat([tokens[:-1] for tokens, _ in sequences]).to(self.device, torch.int64)
        labels = torch.cat([tokens[1:] for tokens, _ in sequences]).to(self.device, torch.int64)
        positions = torch.cat([learned[1:] for _, learned in sequences]).nonzero().squeeze(1).to(self.device)
        lengths = [len(tokens) - 1 for tokens, _ in sequences]
        options = {"logits_to_keep": positions} if self._takes_positions else {}
        with routing(route), packed_sequences(lengths, self.device) as packed:
            output = self.model(input_ids=tokens[None], position_ids=packed.position_ids, use_cache=False, **options)
        logits = output.logits[0] if self._takes_positions else output.logits[0, positions]
        labels = labels[positions]
        loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
        return loss, (logits.detach().argmax(dim=-1) == labels).sum()

    @torch.no_grad()
    def score(self, corpus: Corpus, route: Routing | None, between_packs: Callable[[], None] = lambda: None) -> Score:
        """Over all sequences of a corpus, without gradients."""
        total_loss, num_right, num_learned = 0.0, 0, 0
        for pack in self.packs(corpus, list(range(len(corpus)))):
            loss, right = self(corpus, pack, route)
            total_loss += loss.item()
            num_right += int(right.item())
            num_learned += count_learned(corpus, pack)
            between_packs()
        return Score(total_loss / num_learned, num_right / num_learned)


def count_learned(corpus: Corpus, indices: list[int]) -> int:
    """Tokens that a loss over these sequences is a sum of; the first token of a sequence has nothing before it."""
    return sum(int(corpus.sequence(index)[1][1:].sum()) for index in indices)
