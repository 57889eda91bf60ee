"""The pair of Triton kernels behind `lora_tiles.AddLora`: shrink x to the adapters' ranks, expand into y.

    h[i] = x[i] A[s[i]]        y[i] += h[i] B[s[i]]

One launch serves all adapters of a step, as in Punica's SGMV (arXiv 2310.18547), with tiles of sorted rows. What a
row gets never depends on the crowd: the features are cut into the same pieces for any number of rows, and the pieces
are added in the same order, without atomics. Each slot's own rank is read on the device, so a wide neighbour costs
a narrow adapter nothing. Sums are float32. Knows no step and no model; imported only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adapters.lora import Bank, SlotTable
from adapters.lora_tiles import TILE

_BLOCK_RANK = tl.constexpr(16)
_BLOCK_IN = 128
_BLOCK_OUT = 128
_MAX_SPLITS = 4
"""Shrinking in pieces keeps a device busy that has more cores than the step has tiles."""


def add_lora(table: SlotTable, tiles: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """See `lora_tiles.AddLora`."""
    rows, in_features = x.shape
    num_tiles = tiles.shape[1]
    num_parts = table.ranks.shape[1]
    splits, piece = _pieces(in_features)
    rank_blocks = triton.cdiv(table.r, _BLOCK_RANK.value)
    h = torch.empty(splits, rows, num_parts * table.r, dtype=torch.float32, device=x.device)
    upcast = x.device.type == "cpu"  # the interpreter multiplies no bfloat16
    _shrink[(num_tiles, num_parts * rank_blocks, splits)](
        x, table.a, table.ranks, tiles, h,
        in_features, table.r, rows, x.stride(0), tiles.stride(0),
        PARTS=num_parts, RANK_BLOCKS=rank_blocks, PIECE=piece, TILE=TILE, BLOCK_IN=_BLOCK_IN, UPCAST=upcast,
    )  # fmt: skip
    for bank in table.banks:
        _expand_bank(bank, table, tiles, h, y, upcast)


def _expand_bank(
    bank: Bank, table: SlotTable, tiles: torch.Tensor, h: torch.Tensor, y: torch.Tensor, upcast: bool
) -> None:
    width = bank.b.shape[-1]
    out_blocks = triton.cdiv(width, _BLOCK_OUT)
    _expand[(tiles.shape[1], len(bank.parts) * out_blocks)](
        y, bank.b, h, table.ranks, tiles,
        width, bank.span[0], table.r, h.shape[1], y.stride(0), tiles.stride(0),
        PARTS=table.ranks.shape[1], FIRST_PART=bank.parts[0], BANK_PARTS=len(bank.parts), OUT_BLOCKS=out_blocks,
        SPLITS=h.shape[0], TILE=TILE, BLOCK_OUT=_BLOCK_OUT, UPCAST=upcast,
    )  # fmt: skip


def _pieces(in_features: int) -> tuple[int, int]:
    """How many pieces the features are cut into, and the size of one: never a matter of the number of rows."""
    blocks = triton.cdiv(in_features, _BLOCK_IN)
    splits = min(_MAX_SPLITS, triton.cdiv(blocks, 4))
    return splits, triton.cdiv(blocks, splits) * _BLOCK_IN


@triton.jit
def _shrink(
    x, a, ranks, tiles, h,
    in_features, r, rows, x_stride, tiles_stride,
    PARTS: tl.constexpr, RANK_BLOCKS: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, BLOCK_IN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """h[piece, row, part * r + rank] for one tile, one block of ranks of one part, one piece of the features."""
    tile, block, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(tiles + 2 * tiles_stride + tile)
    if length == 0:
        return
    slot, start = tl.load(tiles + tile), tl.load(tiles + tiles_stride + tile)
    part, first_rank = block // RANK_BLOCKS, (block % RANK_BLOCKS) * _BLOCK_RANK
    rank = tl.load(ranks + slot * PARTS + part)
    if first_rank >= rank:
        return
    row, index = tl.arange(0, TILE), first_rank + tl.arange(0, _BLOCK_RANK)
    x_rows = x + (start + row) * x_stride
    a_rows = a + (slot * PARTS * r + part * r + index) * in_features
    total = tl.zeros((TILE, _BLOCK_RANK), dtype=tl.float32)
    for step in range(0, PIECE, BLOCK_IN):
        feature = piece * PIECE + step + tl.arange(0, BLOCK_IN)
        inside = feature < in_features
        xs = tl.load(x_rows[:, None] + feature[None, :], mask=(row < length)[:, None] & inside[None, :], other=0.0)
        weights = tl.load(a_rows[None, :] + feature[:, None], mask=(index < rank)[None, :] & inside[:, None], other=0.0)
        if UPCAST:
            xs, weights = xs.to(tl.float32), weights.to(tl.float32)
        total = tl.dot(xs, weights, total, input_precision="ieee")
    to = h + ((piece * rows + start + row) * PARTS * r)[:, None] + (part * r + index)[None, :]
    tl.store(to, total, mask=(row < length)[:, None] & (index < rank)[None, :])


@triton.jit
def _expand(
    y, b, h, ranks, tiles,
    width, first_column, r, rows, y_stride, tiles_stride,
    PARTS: tl.constexpr, FIRST_PART: tl.constexpr, BANK_PARTS: tl.constexpr, OUT_BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr, TILE: tl.constexpr, BLOCK_OUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y += h B for one tile and one block of output features of one part of the bank."""
    tile, block = tl.program_id(0), tl.program_id(1)
    length = tl.load(tiles + 2 * tiles_stride + tile)
    if length == 0:
        return
    slot, start = tl.load(tiles + tile), tl.load(tiles + tiles_stride + tile)
    place = block // OUT_BLOCKS
    rank = tl.load(ranks + slot * PARTS + FIRST_PART + place)
    if rank == 0:
        return
    row, column = tl.arange(0, TILE), (block % OUT_BLOCKS) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    present, inside = row < length, column < width
    h_rows = h + (start + row) * PARTS * r + (FIRST_PART + place) * r
    b_part = b + (slot * BANK_PARTS + place) * r * width
    total = tl.zeros((TILE, BLOCK_OUT), dtype=tl.float32)
    for first_rank in range(0, rank, _BLOCK_RANK):
        index = first_rank + tl.arange(0, _BLOCK_RANK)
        wanted = present[:, None] & (index < rank)[None, :]
        hidden = tl.zeros((TILE, _BLOCK_RANK), dtype=tl.float32)
        for piece in tl.static_range(SPLITS):
            hidden += tl.load(h_rows[:, None] + piece * rows * PARTS * r + index[None, :], mask=wanted, other=0.0)
        weights = tl.load(
            b_part + index[:, None] * width + column[None, :], mask=(index < rank)[:, None] & inside[None, :], other=0.0
        )
        hidden = hidden.to(weights.dtype)
        if UPCAST:
            hidden, weights = hidden.to(tl.float32), weights.to(tl.float32)
        total = tl.dot(hidden, weights, total, input_precision="ieee")
    to = y + (start + row)[:, None] * y_stride + (first_column + place * width + column)[None, :]
    mask = present[:, None] & inside[None, :]
    tl.store(to, (tl.load(to, mask=mask, other=0.0).to(tl.float32) + total).to(y.dtype.element_ty), mask=mask)
