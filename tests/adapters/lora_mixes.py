"""Sites with several adapters of different ranks, mixes of rows, and the slow loop beside the kernels."""

from __future__ import annotations

import torch
from torch import nn

from adapters.lora import BatchedLoraLinear, LoraPart, SlotTable, pack
from adapters.lora_weights import LoraPair

PARTS = (LoraPart("q", 40), LoraPart("k", 24), LoraPart("v", 24))
MIXES: dict[str, list[int | None]] = {
    "nobody": [None, None],
    "one row": [1],
    "identical": [2] * 5,
    "distinct": [0, 1, 2, 3],
    "skewed": [None, 0, *[1] * 18, 2, None, 3],
    "returning": [1, None, 1, 0, 1],
}


def random_table(
    in_features: int, ranks: list[int], dtype: torch.dtype, device: torch.device, table_rank: int | None = None
) -> tuple[SlotTable, list[dict[str, LoraPair]]]:
    """A q/k/v site's table with one adapter of each rank, and the adapters. The first one leaves "k" alone."""
    generator = torch.Generator().manual_seed(3)
    site = BatchedLoraLinear(nn.Identity(), in_features, PARTS)
    table = SlotTable(site, len(ranks), table_rank or max(ranks), dtype, device)
    adapters = []
    for slot, rank in enumerate(ranks):
        parts = [part for part in PARTS if slot or part.name != "k"]
        adapters.append({
            part.name: LoraPair(
                torch.randn(rank, in_features, generator=generator) / in_features**0.5,
                torch.randn(part.out_features, rank, generator=generator) / rank**0.5,
                0.5 + slot / 4,
            )
            for part in parts
        })  # fmt: skip
        table.load(slot, pack(site, adapters[-1], table.r, dtype))
    return table, adapters


def rows_of(num_rows: int, in_features: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """x: [rows, in] and y: [rows, out]."""
    generator = torch.Generator().manual_seed(5)
    widths = (in_features, sum(part.out_features for part in PARTS))
    return tuple(torch.randn(num_rows, width, generator=generator).to(device, dtype) for width in widths)


def one_by_one(
    adapters: list[dict[str, LoraPair]], slots: list[int | None], x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """y with every row's update added, row by row in float64."""
    result = y.double().cpu()
    for row, slot in enumerate(slots):
        start = 0
        for part in PARTS:
            pair = None if slot is None else adapters[slot].get(part.name)
            if pair is not None:
                update = pair.b.double() @ (pair.a.double() @ x[row].double().cpu()) * pair.scaling
                result[row, start : start + part.out_features] += update
            start += part.out_features
    return result
