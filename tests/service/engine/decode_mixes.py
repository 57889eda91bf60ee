"""Decode rows of mixed lengths over a cache of random keys and values, and the reference for their attention."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch

from service.engine.decode_attention import DecodeAttention, DecodeKernels, DecodeRows
from service.engine.kv_cache import KvCache, LayerShape, Row
from service.engine.step_attention import StepAttention

SCALE = 0.3
LENGTHS = [1, 64, 65, 290]


@dataclass(frozen=True)
class Shape:
    """An attention layer: heads and sizes, and what limits its scores."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    softcap: float | None = None


SHAPES = {
    "multi-head": Shape(2, 2, 16, 16),
    "grouped": Shape(6, 2, 32, 32),
    "odd sizes": Shape(3, 1, 20, 24),
    "window": Shape(2, 1, 16, 16, window=100),
    "softcap": Shape(2, 1, 16, 16, softcap=5.0),
    "both": Shape(2, 2, 16, 16, window=7, softcap=5.0),
}


class Rows:
    """The same rows for the kernels and for the reference; q, k, v: [heads, rows, dim], strided as models give them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(7)
        self.shape, self.device = shape, device
        layer = LayerShape(shape.kv_heads, shape.key_dim, shape.value_dim)
        self.cache = KvCache([layer], max_bytes=3 << 19, max_model_len=320, dtype=dtype, device=device)
        for buffer in (self.cache.layers[0].keys, self.cache.layers[0].values):
            buffer.copy_(torch.randn(buffer.shape))
        self.lengths = list(LENGTHS)
        self.rows = [self.cache.allocate(length) for length in LENGTHS]

        def random(heads: int, dim: int) -> torch.Tensor:
            return torch.randn(len(LENGTHS), heads, dim).to(device, dtype).transpose(0, 1)

        self.q = random(shape.heads, shape.key_dim)
        self.k, self.v = random(shape.kv_heads, shape.key_dim), random(shape.kv_heads, shape.value_dim)

    def only(self, chosen: list[int]) -> Rows:
        """Some of the rows, in the same cache."""
        some = copy(self)
        some.rows, some.lengths = [self.rows[i] for i in chosen], [self.lengths[i] for i in chosen]
        some.q, some.k, some.v = (t[:, chosen] for t in (self.q, self.k, self.v))
        return some

    def reference(self, compiled: bool = False) -> torch.Tensor:
        """By matrix products, or by the CPU's kernel."""
        positions = [length - 1 for length in self.lengths]
        step = StepAttention(self.cache, [], 0, self.rows, positions, compiled)
        return step.attend(0, self.q, self.k, self.v, SCALE, self.shape.window, self.shape.softcap)

    def fast(self, kernels: DecodeKernels, chosen: list[int] | None = None, pads: int = 0) -> torch.Tensor:
        """By kernels, for these rows in this order, with rows of no tokens behind them."""
        chosen = list(range(len(LENGTHS))) if chosen is None else chosen
        rows: list[Row] = [self.rows[i] for i in chosen] + [self.rows[0]] * pads
        positions = [LENGTHS[i] - 1 for i in chosen] + [-1] * pads
        where = DecodeRows.of(self.cache, rows, positions)
        step = DecodeAttention(self.cache.layers, kernels, where)
        q, k, v = (t[:, chosen + [0] * pads] for t in (self.q, self.k, self.v))
        return step.attend(0, q, k, v, SCALE, self.shape.window, self.shape.softcap)
