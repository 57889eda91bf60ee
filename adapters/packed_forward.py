"""Rows of tokens in one forward, packed, under any routing: logits where they are asked for. Knows no loss and no data.

What is learned from the logits is the objective's business, so rows of several objectives, or of several adapters
under a routing by row, may share a forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from adapters.layer_checkpointing import recomputed_layers
from adapters.lora import Routing, routing
from adapters.memory_budget import MemoryBudget
from adapters.packing import bounded_slices, packed_sequences

Row = tuple[torch.Tensor, torch.Tensor]
"""Tokens and a mask, both [length]: the mask is True at tokens whose prediction is asked for."""


class PackedForward:
    """`memory` bounds a pack, and with it the wait of whoever wants to stop between two."""

    def __init__(self, model: nn.Module, device: torch.device, memory: MemoryBudget) -> None:
        self.model = model
        self.device = device
        self.memory = memory
        self._takes_positions = "logits_to_keep" in inspect.signature(model.forward).parameters

    def packs(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows of these lengths, by index, divided into packs."""
        return bounded_slices(lengths, self.memory.max_slice_tokens)

    def __call__(self, rows: Sequence[Row], route: Routing | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [asked, vocabulary] in the model's dtype and the tokens that stand there [asked], row after row.

        Logits are computed for the positions that are asked for, and no others: in small models they cost more than a
        layer. A row's first token is predicted from nothing, so it is never asked for.
        """
        tokens = torch.cat([tokens[:-1] for tokens, _ in rows]).to(self.device, torch.int64)
        labels = torch.cat([tokens[1:] for tokens, _ in rows]).to(self.device, torch.int64)
        positions = torch.cat([mask[1:] for _, mask in rows]).nonzero().squeeze(1).to(self.device)
        lengths = [len(tokens) - 1 for tokens, _ in rows]
        options = {"logits_to_keep": positions} if self._takes_positions else {}
        layers = recomputed_layers(self.model) if self.memory.recompute_layers else nullcontext()
        with layers, routing(route), packed_sequences(lengths, self.device) as packed:
            output = self.model(input_ids=tokens[None], position_ids=packed.position_ids, use_cache=False, **options)
        logits = output.logits[0] if self._takes_positions else output.logits[0, positions]
        return logits, labels[positions]
