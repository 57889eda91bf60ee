"""The rows of a step, grouped by adapter in tiles of 16, as the CUDA kernels want them. Knows no kernel and no files.

A tile is consecutive rows of one slot. The tiles are planned once a step on the host, and every site of the model
uses them; rows without an adapter are in no tile and cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch

from adapters.lora import BatchedLoraLinear, SlotTable

TILE = 16
"""Rows of a tile: the smallest matrix that tensor cores multiply."""

AddLora = Callable[[SlotTable, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""(table, tiles, x, y): y[i] += (x[i] A[s]) B[s] in place for every row i of every tile; s is the tile's slot.

tiles: [3, num_tiles] slots, first rows and numbers of rows, on the table's device; a tile of no rows is skipped.
x: [rows, in], y: [rows, out].
"""


class Tile(NamedTuple):
    """Rows [start, start + length) of the batch use `slot`."""

    slot: int
    start: int
    length: int


def plan_tiles(slots: Sequence[int | None]) -> list[Tile]:
    """Tiles for rows with these slots. Equal slots side by side give the fewest."""
    tiles: list[Tile] = []
    row = 0
    for slot, group in groupby(slots):
        stop = row + len(list(group))
        if slot is not None:
            tiles += [Tile(slot, start, min(TILE, stop - start)) for start in range(row, stop, TILE)]
        row = stop
    return tiles


def tiles_tensor(tiles: Sequence[Tile], device: torch.device) -> torch.Tensor:
    """[3, num_tiles] int64."""
    return torch.tensor([*zip(*tiles, strict=True)] or [[], [], []], dtype=torch.int64).to(device, non_blocking=True)


@dataclass(frozen=True)
class TiledRouting:
    """Serving on CUDA: the tiles of this step's rows. The output head sees other rows than the layers do.

    `tables` lacks a site that no resident adapter touches.
    """

    tables: Mapping[BatchedLoraLinear, SlotTable]
    body: torch.Tensor
    head: torch.Tensor
    add_lora: AddLora

    def apply(self, site: BatchedLoraLinear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add the adapters in place; x: [..., tokens, in], y: [..., tokens, out]."""
        tiles = self.head if site.is_head else self.body
        table = self.tables.get(site)
        if table is not None and tiles.shape[1]:
            self.add_lora(table, tiles, x.reshape(-1, x.shape[-1]).to(table.a.dtype), y.view(-1, y.shape[-1]))
        return y
