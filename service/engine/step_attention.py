"""Attention of one engine step over the slab cache. Knows rows and positions, not sequences or models.

Row invariance: each decode row is its own [group, head_dim] x [head_dim, capacity] product inside a batched
matmul, and each prefill chunk attends alone. SDPA is not used for decoding: its CPU kernel splits keys by the
number of rows, so a row's bits would depend on the crowd, and with bf16 it is five times slower here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from service.engine.kv_cache import KvCache, Row


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, stop) of the batch continue one sequence at `position`."""

    start: int
    stop: int
    row: Row
    position: int


@dataclass(frozen=True)
class DecodeRun:
    """Neighbouring cache rows that one batched matmul serves. `first` is the lowest row.

    lengths: [num_rows] tokens visible to each row, on the cache's device.
    """

    first: Row
    num_rows: int
    lengths: torch.Tensor


@dataclass
class StepAttention:
    """One engine step: prefill chunks first, then decode tokens from `decode_start` on.

    `order` sorts the decode tokens into the order of `runs`, `inverse` puts them back; None where they agree.
    """

    cache: KvCache
    prefills: Sequence[PrefillChunk]
    decode_start: int
    runs: Sequence[DecodeRun]
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    rows: Sequence[Row]
    positions: Sequence[int]

    def __post_init__(self) -> None:
        self._lines: dict[int, torch.Tensor] = {}
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """q: [heads, tokens, dim], k and v: [kv_heads, tokens, dim] -> [tokens, heads, value_dim]."""
        buffer = self.cache.layers[layer]
        lines = self._destinations(buffer.num_kv_heads)
        buffer.keys.index_copy_(0, lines, k.transpose(0, 1).reshape(-1, k.shape[-1]))
        buffer.values.index_copy_(0, lines, v.transpose(0, 1).reshape(-1, v.shape[-1]))
        outputs = [self._prefill(layer, chunk, q, scale, window, softcap) for chunk in self.prefills]
        if self.runs:
            outputs.append(self._decode(layer, q[:, self.decode_start :], scale, window, softcap))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _destinations(self, num_kv_heads: int) -> torch.Tensor:
        if num_kv_heads not in self._lines:
            self._lines[num_kv_heads] = self.cache.destinations(self.rows, self.positions, num_kv_heads)
        return self._lines[num_kv_heads]

    def _prefill(
        self,
        layer: int,
        chunk: PrefillChunk,
        q: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        buffer = self.cache.layers[layer]
        length = chunk.position + chunk.stop - chunk.start
        keys, values = (
            self.cache.rows(b, buffer.num_kv_heads, chunk.row, chunk.row.index + 1)[:, :length]
            for b in (buffer.keys, buffer.values)
        )
        query = q[:, chunk.start : chunk.stop]
        at = torch.arange(chunk.position, length, device=q.device)[:, None]
        key_at = torch.arange(length, device=q.device)
        mask = key_at <= at
        if window is not None:
            mask &= key_at > at - window
        if softcap is not None:
            return softcapped(query, keys, values, mask, scale, softcap).transpose(0, 1)
        simple = chunk.position == 0 and (window is None or window >= length)
        out = scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            attn_mask=None if simple else mask,
            is_causal=simple,
            scale=scale,
            enable_gqa=query.shape[0] != keys.shape[0],
        )
        return out[0].transpose(0, 1)

    def _decode(
        self, layer: int, q: torch.Tensor, scale: float, window: int | None, softcap: float | None
    ) -> torch.Tensor:
        buffer = self.cache.layers[layer]
        heads = q.transpose(0, 1)  # [rows, heads, dim]
        if self.order is not None:
            heads = heads.index_select(0, self.order)
        outputs, start = [], 0
        group = q.shape[0] // buffer.num_kv_heads
        for index, run in enumerate(self.runs):
            stop = run.first.index + run.num_rows
            keys = self.cache.rows(buffer.keys, buffer.num_kv_heads, run.first, stop)
            values = self.cache.rows(buffer.values, buffer.num_kv_heads, run.first, stop)
            query = heads[start : start + run.num_rows].reshape(-1, group, q.shape[-1])
            mask = self._mask(index, run, buffer.num_kv_heads, window, q.dtype)
            if softcap is None:
                scores = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=scale)
            else:
                scores = torch.bmm(query, keys.transpose(1, 2)) * (scale / softcap)
                scores = torch.tanh(scores) * softcap + mask
            weights = torch.softmax(scores, dim=-1)  # computed in float32, whatever the dtype
            outputs.append(torch.bmm(weights, values).view(run.num_rows, -1, values.shape[-1]))
            start += run.num_rows
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out if self.inverse is None else out.index_select(0, self.inverse)

    def _mask(
        self, index: int, run: DecodeRun, num_kv_heads: int, window: int | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """[rows * kv_heads, 1, capacity]: 0 where a row may look, -inf elsewhere. Shared by all layers."""
        found = self._masks.get((index, num_kv_heads, window))
        if found is None:
            at = torch.arange(run.first.capacity, device=run.lengths.device)
            hidden = at >= run.lengths[:, None]
            if window is not None:
                hidden |= at < run.lengths[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            found = mask.repeat_interleave(num_kv_heads, dim=0).unsqueeze(1)
            self._masks[(index, num_kv_heads, window)] = found
        return found


def softcapped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attention with Gemma 2's tanh cap, one sequence: query [heads, m, dim] -> [heads, m, value_dim]."""
    group = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
    scores = torch.tanh(query @ keys.transpose(1, 2) * (scale / softcap)) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values
