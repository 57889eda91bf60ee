"""The base run over packs of rows, one or several side by side. Knows no turns, no loss and no data."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from adapters.layer_checkpointing import recomputed_layers
from adapters.lora import Routing, routing
from adapters.packing import JointPack, PackedBatch, packed_as

Row = tuple[torch.Tensor, torch.Tensor]
"""Tokens and a mask, both [length]: the mask is True at tokens whose prediction is asked for."""

FINE_STEP, COARSE_STEP, COARSE_FROM = 16, 64, 256
"""Packs are filled to a multiple of the first, or from so many tokens on of the second."""


@dataclass(frozen=True)
class AskedRows:
    """tokens: int64 [tokens], the rows without their last ones; positions: where predictions are asked for, [asked];
    labels: the tokens that stand there, [asked]; lengths: of each row."""

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    lengths: list[int]

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> AskedRows:
        """A row's first token is predicted from nothing, so it is never asked for."""
        tokens = torch.cat([tokens[:-1] for tokens, _ in rows]).to(device, torch.int64)
        labels = torch.cat([tokens[1:] for tokens, _ in rows]).to(device, torch.int64)
        positions = torch.cat([mask[1:] for _, mask in rows]).nonzero().squeeze(1).to(device)
        lengths = [len(tokens) - 1 for tokens, _ in rows]
        if filler := _filler(len(tokens)):
            tokens, lengths = torch.cat([tokens, tokens.new_zeros(filler)]), [*lengths, filler]
        return cls(tokens, positions, labels[positions], lengths)


def _filler(num_rows: int) -> int:
    """How many rows that nobody asks about make a round number of rows in every product.

    oneDNN compiles and keeps each shape that it meets: with any number of tokens that came to 500 MB in a run.
    """
    step = FINE_STEP if num_rows < COARSE_FROM else COARSE_STEP
    return -num_rows % step


class PackedModel:
    """Logits are computed for the positions that are asked for, and no others: in small models they cost more than a
    layer."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.takes_positions = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, packs: Sequence[AskedRows], route: Routing | None, *, recompute: bool) -> torch.Tensor:
        """Logits of all packs, one after the other: [asked, vocabulary] in the model's dtype."""
        tokens = torch.cat([pack.tokens for pack in packs])
        starts = [0]
        for pack in packs:
            starts.append(starts[-1] + len(pack.tokens))
        positions = torch.cat([pack.positions + start for pack, start in zip(packs, starts, strict=False)])
        filled = torch.cat([positions, positions.new_zeros(_filler(len(positions)))])
        options = {"logits_to_keep": filled} if self.takes_positions else {}
        layers = recomputed_layers(self.model) if recompute else nullcontext()
        layout = self._layout(packs)
        with layers, routing(route), packed_as(layout):
            output = self.model(input_ids=tokens[None], position_ids=layout.position_ids, use_cache=False, **options)
        logits: torch.Tensor = output.logits[0]
        return logits[: len(positions)] if self.takes_positions else logits[positions]

    def head_rows(self, packs: Sequence[AskedRows]) -> list[int]:
        """How many rows of each pack the output head sees."""
        return [len(pack.positions if self.takes_positions else pack.tokens) for pack in packs]

    def _layout(self, packs: Sequence[AskedRows]) -> PackedBatch | JointPack:
        """On CPU each pack keeps its shapes, and so its bits; on CUDA fewer launches count for more."""
        if self.device.type == "cpu" and len(packs) > 1:
            return JointPack([PackedBatch(pack.lengths, self.device) for pack in packs])
        return PackedBatch([length for pack in packs for length in pack.lengths], self.device)
