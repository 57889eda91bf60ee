"""Attention of one engine step over the slab cache. Knows rows and positions, not sequences or models.

Row invariance: each decode row is computed alone; each block of a prompt attends alone, to the keys up to its end,
wherever its chunk starts and stops. On CPU a compiled kernel decodes; elsewhere each row is its own
[group, head_dim] x [head_dim, capacity] product inside a batched matmul. SDPA is not used for decoding: its CPU kernel
splits keys by the number of rows, so a row's bits would depend on the crowd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from adapters import jit
from service.engine.attention_cpu import decode_rows
from service.engine.kv_cache import KvCache, Row

_LEAST_ROWS = 4
"""Blocks of fewer tokens are padded: on CPU a float32 product of one row rounds by where in memory things lie."""


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


@dataclass(frozen=True)
class DecodeRuns:
    """`order` sorts the decode tokens into the order of the runs, `inverse` puts them back; None where they agree."""

    runs: Sequence[DecodeRun]
    order: torch.Tensor | None
    inverse: torch.Tensor | None


@dataclass
class StepAttention:
    """One engine step: prefill chunks first, then one token per decoding sequence from `decode_start` on.

    `rows` and `positions` hold each token's place. `compiled`: take the CPU kernel where there is one.
    """

    cache: KvCache
    prefills: Sequence[PrefillChunk]
    decode_start: int
    rows: Sequence[Row]
    positions: Sequence[int]
    compiled: bool = True

    def __post_init__(self) -> None:
        self._lines: dict[tuple[int, int], torch.Tensor] = {}
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}
        self._block_masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

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
        compiled = self.compiled and q.device.type == "cpu" and q.dtype in jit.DTYPES
        start = self.decode_start
        self._store(layer, k, v, start if compiled else q.shape[1])
        outputs = [self._prefill(layer, chunk, q, scale, window, softcap) for chunk in self.prefills]
        if start < q.shape[1]:
            if compiled:
                outputs.append(self._decode_compiled(layer, q, k, v, scale, window, softcap))
            else:
                outputs.append(self._decode(layer, q[:, start:], scale, window, softcap))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _store(self, layer: int, k: torch.Tensor, v: torch.Tensor, stop: int) -> None:
        """Write the keys and values of the first `stop` tokens."""
        if not stop:
            return
        buffer = self.cache.layers[layer]
        key = (buffer.num_kv_heads, stop)
        if key not in self._lines:
            self._lines[key] = self.cache.destinations(self.rows[:stop], self.positions[:stop], buffer.num_kv_heads)
        buffer.keys.index_copy_(0, self._lines[key], k[:, :stop].transpose(0, 1).reshape(-1, k.shape[-1]))
        buffer.values.index_copy_(0, self._lines[key], v[:, :stop].transpose(0, 1).reshape(-1, v.shape[-1]))

    def _decode_compiled(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        buffer = self.cache.layers[layer]
        rows = [jit.array(x[:, self.decode_start :].transpose(0, 1).contiguous()) for x in (q, k, v)]
        out = q.new_empty(q.shape[1] - self.decode_start, q.shape[0], v.shape[-1])
        decode_rows(
            *rows,
            buffer.key_array,
            buffer.value_array,
            *self._places,
            jit.array(out),
            scale,
            window or 0,
            softcap or 0.0,
        )
        return out

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First token slot, capacity and number of visible tokens of each decode row."""
        rows, positions = self.rows[self.decode_start :], self.positions[self.decode_start :]
        starts = np.array([self.cache.first_token(row) for row in rows], dtype=np.int64)
        capacities = np.array([row.capacity for row in rows], dtype=np.int64)
        return starts, capacities, np.array(positions, dtype=np.int64) + 1

    def _prefill(
        self,
        layer: int,
        chunk: PrefillChunk,
        q: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Block by block of the prompt's grid, so that a token's bits do not depend on where its chunk starts."""
        buffer = self.cache.layers[layer]
        keys, values = (
            self.cache.rows(b, buffer.num_kv_heads, chunk.row, chunk.row.index + 1)
            for b in (buffer.keys, buffer.values)
        )
        outputs, end, to_batch = [], chunk.position + chunk.stop - chunk.start, chunk.start - chunk.position
        for start in range(chunk.position, end, self.cache.block):
            stop = min(end, start + self.cache.block)
            query = q[:, start + to_batch : stop + to_batch]
            outputs.append(self._block(start, query, keys[:, :stop], values[:, :stop], scale, window, softcap))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _block(
        self,
        start: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """query: [heads, tokens from `start` on, dim], keys and values: [kv_heads, all tokens so far, dim]."""
        length, rows = keys.shape[1], query.shape[1]
        if rows < _LEAST_ROWS:
            query = functional.pad(query, (0, 0, 0, _LEAST_ROWS - rows))
        simple = start == 0 and softcap is None and (window is None or window >= length)
        mask = None if simple else self._causal(start, query.shape[1], length, window, query.device)
        if softcap is not None and mask is not None:
            return softcapped(query, keys, values, mask, scale, softcap)[:, :rows].transpose(0, 1)
        out = scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=simple,
            scale=scale,
            enable_gqa=query.shape[0] != keys.shape[0],
        )
        return out[0, :, :rows].transpose(0, 1)

    def _causal(self, start: int, rows: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
        """[rows, length]: True where a token of the block may look. Shared by layers and sequences."""
        found = self._block_masks.get((start, length, window))
        if found is None:
            at, key_at = torch.arange(start, start + rows, device=device)[:, None], torch.arange(length, device=device)
            found = key_at <= at
            if window is not None:
                found &= key_at > at - window
            self._block_masks[start, length, window] = found
        return found

    def _decode(
        self, layer: int, q: torch.Tensor, scale: float, window: int | None, softcap: float | None
    ) -> torch.Tensor:
        """The same in batched products, one per run of neighbouring cache rows."""
        buffer = self.cache.layers[layer]
        plan = self._runs
        heads = q.transpose(0, 1)  # [rows, heads, dim]
        if plan.order is not None:
            heads = heads.index_select(0, plan.order)
        outputs, start = [], 0
        group = q.shape[0] // buffer.num_kv_heads
        for index, run in enumerate(plan.runs):
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
        return out if plan.inverse is None else out.index_select(0, plan.inverse)

    @cached_property
    def _runs(self) -> DecodeRuns:
        """Group decode rows that are neighbours in the cache."""
        rows, positions = self.rows[self.decode_start :], self.positions[self.decode_start :]
        by_row = sorted(range(len(rows)), key=lambda i: rows[i].order)
        groups: list[tuple[Row, list[int]]] = []  # first row, visible lengths
        for index in by_row:
            if groups and _follows(rows[index], *groups[-1]):
                groups[-1][1].append(positions[index] + 1)
            else:
                groups.append((rows[index], [positions[index] + 1]))
        device = self.cache.device
        runs = [DecodeRun(first, len(lengths), torch.tensor(lengths, device=device)) for first, lengths in groups]
        if by_row == list(range(len(rows))):
            return DecodeRuns(runs, None, None)
        order = torch.tensor(by_row, device=device)
        return DecodeRuns(runs, order, torch.argsort(order))

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


def _follows(row: Row, first: Row, lengths: list[int]) -> bool:
    same_slab = row.slab == first.slab and row.capacity == first.capacity
    return same_slab and row.index == first.index + len(lengths)


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
