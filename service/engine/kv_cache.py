"""Where keys and values live: equal slabs under a byte budget, rows of one capacity in each slab.

A slab taken from the free list serves one size class (64, 96, 128, 192, ... tokens a row) and goes back when its
last row is freed. A sequence owns one row and moves to the next class when it outgrows it, so attention reads
its keys in place, padded to less than 1.5 times its length, with no gather. A row's capacity depends only on the
sequence's own length: what a sequence computes does not depend on who else is in the cache.

Slabs that nobody needs may hold *blocks*: copies of computed tokens, a few each, which the prefix cache keeps. They
count as free memory: a slab of blocks is emptied for the first row that needs it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import gcd

import numpy as np
import torch

from adapters import jit

_SMALLEST_ROW = 64
_BLOCK = 32
_SMALLEST_BLOCK = 8
_ALIGNMENT = 64  # bytes


def block_tokens(prefill_chunk: int) -> int:
    """Tokens of a block: the grid on which prompts are cut for attention and for reuse. Chunks are whole blocks."""
    block = gcd(prefill_chunk, _BLOCK)
    return block if block >= _SMALLEST_BLOCK else prefill_chunk


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one attention layer's cache."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Row:
    """A sequence's place: row `index` of a slab whose rows hold `capacity` tokens."""

    slab: int
    index: int
    capacity: int

    @property
    def order(self) -> tuple[int, int, int]:
        return (self.capacity, self.slab, self.index)


@dataclass
class _Slab:
    capacity: int
    free: list[int]  # a heap: lowest rows first, so that neighbours share a matmul
    num_rows: int


@dataclass
class LayerBuffer:
    keys: torch.Tensor  # [num_slabs * slab_tokens * num_kv_heads, key_dim]
    values: torch.Tensor  # [num_slabs * slab_tokens * num_kv_heads, value_dim]
    num_kv_heads: int

    def __post_init__(self) -> None:
        if self.keys.device.type == "cpu" and self.keys.dtype in jit.DTYPES:  # the same memory, for the CPU kernel
            self.key_array = jit.array(self.keys)
            self.value_array = jit.array(self.values)


@dataclass
class _Stack:
    """The buffers of all layers of one shape, one behind the other: [layers, lines, dim]."""

    tensor: torch.Tensor
    num_kv_heads: int


class KvCacheFullError(Exception):
    """No row of the wanted size is free."""


def size_classes(slab_tokens: int) -> list[int]:
    """Row capacities: powers of two and the values halfway between, up to the slab."""
    classes, power = [], _SMALLEST_ROW
    while power < slab_tokens:
        classes += [power, power * 3 // 2]
        power *= 2
    return [c for c in classes if c < slab_tokens] + [slab_tokens]


class KvCache:
    """Keys and values of every sequence in the running batch."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        max_bytes: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        block: int = _BLOCK,
    ) -> None:
        self.block = block
        self.slab_tokens = -(-max_model_len // _SMALLEST_ROW) * _SMALLEST_ROW
        self.classes = size_classes(self.slab_tokens)
        per_token = sum(s.num_kv_heads * (s.key_dim + s.value_dim) for s in layers) * dtype.itemsize
        self.num_slabs = max_bytes // (per_token * self.slab_tokens)
        if self.num_slabs < 2:
            needed = 2 * per_token * self.slab_tokens
            raise ValueError(
                f"kv_cache_bytes={max_bytes} is too small: two sequences of {max_model_len} tokens need {needed}"
            )
        self._stacks: list[_Stack] = []
        found: dict[int, LayerBuffer] = {}
        for shape in dict.fromkeys(layers):
            members = [index for index, one in enumerate(layers) if one == shape]
            lines = self.num_slabs * self.slab_tokens * shape.num_kv_heads
            keys = _zeros(len(members), lines, shape.key_dim, dtype, device)
            values = _zeros(len(members), lines, shape.value_dim, dtype, device)
            self._stacks += [_Stack(keys, shape.num_kv_heads), _Stack(values, shape.num_kv_heads)]
            found |= {i: LayerBuffer(keys[n], values[n], shape.num_kv_heads) for n, i in enumerate(members)}
        self.layers = [found[index] for index in range(len(layers))]
        self.device = device
        self._free_slabs = list(range(self.num_slabs - 1, -1, -1))
        self._slabs: dict[int, _Slab] = {}
        self._open: dict[int, dict[int, None]] = {}  # slabs with a free row, by capacity
        self._block_slabs: set[int] = set()
        self.empty_block_slab: Callable[[], None] | None = None
        """Frees every block of one slab; called when a row needs a slab and only blocks are in the way."""

    def close(self) -> None:
        """Give the memory back."""
        self._stacks.clear()
        self.layers.clear()

    def row_for(self, num_tokens: int) -> int:
        """The capacity of the row in which a sequence of `num_tokens` lives."""
        return self.classes[bisect_left(self.classes, num_tokens)]

    def has_room(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` would find a row now."""
        return bool(self._free_slabs or self._block_slabs or self._open.get(self.row_for(num_tokens)))

    def allocate(self, num_tokens: int) -> Row:
        """A row for a sequence of `num_tokens`. Blocks make way for it.

        Raises:
            KvCacheFullError: the budget is used up for this size.
        """
        capacity = self.row_for(num_tokens)
        if not self._open.get(capacity):
            if not self._free_slabs and self._block_slabs:
                assert self.empty_block_slab is not None, "blocks have an owner"
                self.empty_block_slab()
            if not self._free_slabs:
                raise KvCacheFullError(f"no slab left for a row of {capacity} tokens")
            self._open_slab(capacity)
        return self._take(capacity)

    def allocate_block(self) -> Row | None:
        """A place for a block where nothing else is; None when that would take the last free slab."""
        if not self._open.get(self.block):
            if len(self._free_slabs) < 2:
                return None
            self._block_slabs.add(self._open_slab(self.block))
        return self._take(self.block)

    def free(self, row: Row) -> None:
        """Give back a row or a block."""
        slab, slabs = self._slabs[row.slab], self._open.setdefault(row.capacity, {})
        heappush(slab.free, row.index)
        slabs[row.slab] = None
        if len(slab.free) == slab.num_rows:
            del self._slabs[row.slab], slabs[row.slab]
            self._block_slabs.discard(row.slab)
            self._free_slabs.append(row.slab)

    def _open_slab(self, capacity: int) -> int:
        slab_id, num_rows = self._free_slabs.pop(), self.slab_tokens // capacity
        self._slabs[slab_id] = _Slab(capacity, list(range(num_rows)), num_rows)
        self._open.setdefault(capacity, {})[slab_id] = None
        return slab_id

    def _take(self, capacity: int) -> Row:
        slab_id = next(iter(self._open[capacity]))
        slab = self._slabs[slab_id]
        index = heappop(slab.free)
        if not slab.free:
            del self._open[capacity][slab_id]
        return Row(slab_id, index, capacity)

    def grow(self, row: Row, num_tokens: int, num_computed: int) -> Row:
        """Move a sequence to a row that holds `num_tokens`; its first `num_computed` tokens come along."""
        if num_tokens <= row.capacity:
            return row
        new = self.allocate(num_tokens)
        for stack in self._stacks:
            self._row_of(stack, new)[:, :, :num_computed] = self._row_of(stack, row)[:, :, :num_computed]
        self.free(row)
        return new

    def rows(self, buffer: torch.Tensor, num_kv_heads: int, first: Row, stop: int) -> torch.Tensor:
        """Rows [first, stop) of one slab as a view: [num_rows * num_kv_heads, capacity, head_dim]."""
        start = self._line(first, num_kv_heads)
        length = (stop - first.index) * first.capacity * num_kv_heads
        return buffer[start : start + length].view(-1, first.capacity, buffer.shape[-1])

    def first_token(self, row: Row) -> int:
        """How many tokens' places lie before the row; its first line in a layer's buffer is kv_heads times that."""
        return row.slab * self.slab_tokens + row.index * row.capacity

    def _line(self, row: Row, num_kv_heads: int) -> int:
        return self.first_token(row) * num_kv_heads

    def copy(self, source: Sequence[tuple[Row, int]], target: Sequence[tuple[Row, int]]) -> None:
        """Copy blocks of keys and values; each is a row and the position in it where the block starts."""
        for stack in self._stacks:
            for old, new in zip(source, target, strict=True):
                self._block_of(stack, *new).copy_(self._block_of(stack, *old))

    def _block_of(self, stack: _Stack, row: Row, start: int) -> torch.Tensor:
        """[layers, num_kv_heads, block, dim], a view."""
        return self._row_of(stack, row)[:, :, start : start + self.block]

    def _row_of(self, stack: _Stack, row: Row) -> torch.Tensor:
        """[layers, num_kv_heads, capacity, dim], a view."""
        line = self._line(row, stack.num_kv_heads)
        lines = stack.tensor[:, line : line + row.capacity * stack.num_kv_heads]
        return lines.view(stack.tensor.shape[0], stack.num_kv_heads, row.capacity, -1)

    def destinations(self, rows: Sequence[Row], positions: Sequence[int], num_kv_heads: int) -> torch.Tensor:
        """Buffer lines for tokens at (row, position): [tokens * num_kv_heads], head by head within a token."""
        row = np.array([[r.slab, r.index, r.capacity] for r in rows], dtype=np.int64)
        base = row[:, 0] * self.slab_tokens + row[:, 1] * row[:, 2]
        heads = np.arange(num_kv_heads)
        lines = base[:, None] * num_kv_heads + heads * row[:, 2:3] + np.array(positions)[:, None]
        return torch.from_numpy(lines.reshape(-1)).to(self.device)

    @property
    def usage(self) -> float:
        """Share of the budget's rows in use, a slab by its used rows. 0 is empty, 1 is full. Blocks are free."""
        used = sum((s.num_rows - len(s.free)) / s.num_rows for s in self._slabs.values() if s.capacity != self.block)
        return used / self.num_slabs

    @property
    def num_blocks(self) -> int:
        return sum(self._slabs[slab].num_rows - len(self._slabs[slab].free) for slab in self._block_slabs)


def _zeros(layers: int, lines: int, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, not garbage: a masked key of NaN would still poison its row. On CPU the pages come when used.

    Aligned like all tensors: some products of float32 round differently where they are not.
    """
    if device.type != "cpu":
        return torch.zeros(layers, lines, dim, dtype=dtype, device=device)
    size = layers * lines * dim * dtype.itemsize
    raw = np.zeros(size + _ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(layers, lines, dim)
