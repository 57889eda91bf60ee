"""Where keys and values live: equal slabs under a byte budget, rows of one capacity in each slab.

A slab taken from the free list serves one size class (64, 96, 128, 192, ... tokens a row) and goes back when its
last row is freed. A sequence owns one row and moves to the next class when it outgrows it, so attention reads
its keys in place, padded to less than 1.5 times its length, with no gather. A row's capacity depends only on the
sequence's own length: what a sequence computes does not depend on who else is in the cache.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adapters import jit

_SMALLEST_ROW = 64


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
    free: list[int]
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
    ) -> None:
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

    def close(self) -> None:
        """Give the memory back."""
        self._stacks.clear()
        self.layers.clear()

    def row_for(self, num_tokens: int) -> int:
        """The capacity of the row in which a sequence of `num_tokens` lives."""
        return self.classes[bisect_left(self.classes, num_tokens)]

    def has_room(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` would find a row now."""
        capacity = self.row_for(num_tokens)
        return bool(self._free_slabs) or any(s.capacity == capacity and s.free for s in self._slabs.values())

    def allocate(self, num_tokens: int) -> Row:
        """A row for a sequence of `num_tokens`.

        Raises:
            KvCacheFullError: the budget is used up for this size.
        """
        capacity = self.row_for(num_tokens)
        slab_id = next((i for i, s in self._slabs.items() if s.capacity == capacity and s.free), None)
        if slab_id is None:
            if not self._free_slabs:
                raise KvCacheFullError(f"no slab left for a row of {capacity} tokens")
            slab_id = self._free_slabs.pop()
            num_rows = self.slab_tokens // capacity
            self._slabs[slab_id] = _Slab(capacity, list(range(num_rows - 1, -1, -1)), num_rows)
        return Row(slab_id, self._slabs[slab_id].free.pop(), capacity)

    def free(self, row: Row) -> None:
        slab = self._slabs[row.slab]
        slab.free.append(row.index)
        slab.free.sort(reverse=True)  # lowest rows first: neighbours share a matmul
        if len(slab.free) == slab.num_rows:
            del self._slabs[row.slab]
            self._free_slabs.append(row.slab)

    def grow(self, row: Row, num_tokens: int, num_computed: int) -> Row:
        """Move a sequence to a row that holds `num_tokens`; its first `num_computed` tokens come along."""
        if num_tokens <= row.capacity:
            return row
        new = self.allocate(num_tokens)
        for stack in self._stacks:
            old_rows, new_rows = (
                stack.tensor[:, self._line(r, stack.num_kv_heads) :][:, : r.capacity * stack.num_kv_heads].view(
                    stack.tensor.shape[0], stack.num_kv_heads, r.capacity, -1
                )
                for r in (row, new)
            )
            new_rows[:, :, :num_computed] = old_rows[:, :, :num_computed]
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

    def destinations(self, rows: Sequence[Row], positions: Sequence[int], num_kv_heads: int) -> torch.Tensor:
        """Buffer lines for tokens at (row, position): [tokens * num_kv_heads], head by head within a token."""
        row = np.array([[r.slab, r.index, r.capacity] for r in rows], dtype=np.int64)
        base = row[:, 0] * self.slab_tokens + row[:, 1] * row[:, 2]
        heads = np.arange(num_kv_heads)
        lines = base[:, None] * num_kv_heads + heads * row[:, 2:3] + np.array(positions)[:, None]
        return torch.from_numpy(lines.reshape(-1)).to(self.device)

    @property
    def usage(self) -> float:
        """Share of the budget's rows in use, counting a slab by its used rows. 0 is empty, 1 is full."""
        used = sum((s.num_rows - len(s.free)) / s.num_rows for s in self._slabs.values())
        return used / self.num_slabs


def _zeros(layers: int, lines: int, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, not garbage: a masked key of NaN would still poison its row. On CPU the pages come when used."""
    if device.type != "cpu":
        return torch.zeros(layers, lines, dim, dtype=dtype, device=device)
    raw = np.zeros(layers * lines * dim * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(layers, lines, dim)
