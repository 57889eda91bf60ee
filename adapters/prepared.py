"""An adapter ready for a slot: packed as the slot tables hold it, in their dtype. Knows no slot and no store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from adapters.lora import BatchedLoraLinear, PackedLora, pack
from adapters.lora_weights import LoraWeights

RANK_STEP = 8
"""Tables and packed adapters are as wide as a multiple of this."""


@dataclass(frozen=True)
class PreparedAdapter:
    """`sites` lacks those that the adapter leaves alone."""

    max_rank: int
    sites: Mapping[BatchedLoraLinear, PackedLora]
    num_bytes: int


def prepare(
    weights: LoraWeights, sites: Iterable[BatchedLoraLinear], dtype: torch.dtype, *, pinned: bool
) -> PreparedAdapter:
    """Transpose, scale and convert beside the engine's thread, which then only copies."""
    r = padded_rank(weights.max_rank)
    found = {site: packed for site in sites if (packed := pack(site, weights.modules, r, dtype))}
    if pinned:
        found = {site: packed.pinned() for site, packed in found.items()}
    return PreparedAdapter(weights.max_rank, found, sum(packed.num_bytes for packed in found.values()))


def preparing(
    source: Callable[[str], LoraWeights], sites: Iterable[BatchedLoraLinear], dtype: torch.dtype, *, pinned: bool
) -> Callable[[str], PreparedAdapter]:
    """What a loading thread does: read and verify, then everything that a slot need not wait for."""
    distinct = list(dict.fromkeys(sites))

    def load(digest: str) -> PreparedAdapter:
        return prepare(source(digest), distinct, dtype, pinned=pinned)

    return load


def padded_rank(rank: int) -> int:
    return -(-rank // RANK_STEP) * RANK_STEP
