"""Triton kernels for decode rows over the slab cache: store the new key and value, then attend. Knows no step.

Attention is flash-decoding: a row's visible keys are cut into at most `_MAX_SPLITS` pieces that are attended side by
side and merged in order. The pieces depend on the row's own length only, so a row's bits never depend on the crowd.
Sums are float32. Lengths and places are read on the device, so a CUDA graph can be replayed with other rows. Imported
only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from service.engine.decode_attention import DecodeRows
from service.engine.kv_cache import LayerBuffer

_MAX_SPLITS = 16
_LEAST_SPLIT = tl.constexpr(128)
_BLOCK_BYTES = 16384
"""Of keys or values that a program looks at in one go: it must hold a few such blocks in shared memory."""


class TritonDecoding:
    """The fast `DecodeKernels`."""

    def store(self, rows: DecodeRows, buffer: LayerBuffer, k: torch.Tensor, v: torch.Tensor) -> None:
        """See `DecodeKernels.store`."""
        _store[(len(rows), buffer.num_kv_heads)](
            k, v, buffer.keys, buffer.values, rows.first, rows.capacity, rows.lengths,
            *k.stride(), *v.stride(),
            KEY_DIM=k.shape[-1], VALUE_DIM=v.shape[-1], HEADS=buffer.num_kv_heads,
            BLOCK_KEY=triton.next_power_of_2(k.shape[-1]), BLOCK_VALUE=triton.next_power_of_2(v.shape[-1]),
        )  # fmt: skip

    def attend(
        self,
        rows: DecodeRows,
        buffer: LayerBuffer,
        q: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """See `DecodeKernels.attend`."""
        heads, num_rows, key_dim = q.shape
        value_dim = buffer.values.shape[-1]
        group = heads // buffer.num_kv_heads
        block_key, block_value = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
        block_keys = max(16, min(64, _BLOCK_BYTES // (q.element_size() * max(block_key, block_value))))
        sums = torch.empty(num_rows, heads, _MAX_SPLITS, value_dim, dtype=torch.float32, device=q.device)
        maxima, norms = torch.empty(2, num_rows, heads, _MAX_SPLITS, dtype=torch.float32, device=q.device)
        _attend_split[(num_rows, buffer.num_kv_heads, _MAX_SPLITS)](
            q, buffer.keys, buffer.values, rows.first, rows.capacity, rows.lengths, sums, maxima, norms,
            scale, softcap or 0.0, *q.stride(),
            KV_HEADS=buffer.num_kv_heads, GROUP=group, KEY_DIM=key_dim, VALUE_DIM=value_dim,
            WINDOW=window or 0, HAS_SOFTCAP=softcap is not None, MAX_SPLITS=_MAX_SPLITS,
            BLOCK_GROUP=max(16, triton.next_power_of_2(group)), BLOCK_KEYS=block_keys,
            BLOCK_KEY_DIM=max(16, block_key), BLOCK_VALUE_DIM=max(16, block_value),
            UPCAST=q.device.type == "cpu",  # the interpreter multiplies no bfloat16
        )  # fmt: skip
        out = torch.empty(num_rows, heads, value_dim, dtype=q.dtype, device=q.device)
        _merge[(num_rows, heads)](
            sums, maxima, norms, rows.lengths, out,
            HEADS=heads, VALUE_DIM=value_dim, WINDOW=window or 0, MAX_SPLITS=_MAX_SPLITS, BLOCK_VALUE_DIM=block_value,
        )  # fmt: skip
        return out


@triton.jit
def _store(
    k, v, keys, values, first, capacity, lengths,
    k_head_stride, k_row_stride, k_dim_stride, v_head_stride, v_row_stride, v_dim_stride,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """One row's key and value of one head into the last of its visible lines."""
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row)
    if length == 0:
        return
    line = tl.load(first + row) * HEADS + head * tl.load(capacity + row) + length - 1
    at = tl.arange(0, BLOCK_KEY)
    key = tl.load(k + head * k_head_stride + row * k_row_stride + at * k_dim_stride, mask=at < KEY_DIM)
    tl.store(keys + line * KEY_DIM + at, key, mask=at < KEY_DIM)
    at = tl.arange(0, BLOCK_VALUE)
    value = tl.load(v + head * v_head_stride + row * v_row_stride + at * v_dim_stride, mask=at < VALUE_DIM)
    tl.store(values + line * VALUE_DIM + at, value, mask=at < VALUE_DIM)


@triton.jit
def _attend_split(
    q, keys, values, first, capacity, lengths, sums, maxima, norms,
    scale, softcap, q_head_stride, q_row_stride, q_dim_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_KEY_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Softmax sums of one row's query heads of one group over one piece of its keys."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    lowest = length * 0
    if WINDOW:
        lowest = tl.maximum(length - WINDOW, 0)
    piece = tl.cdiv(tl.cdiv(length - lowest, MAX_SPLITS), _LEAST_SPLIT) * _LEAST_SPLIT
    start = lowest + split * piece
    if start >= length:
        return
    stop = tl.minimum(start + piece, length)
    line = tl.load(first + row) * KV_HEADS + kv_head * tl.load(capacity + row)
    member, key_at, value_at = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_KEY_DIM), tl.arange(0, BLOCK_VALUE_DIM)
    head = kv_head * GROUP + member
    query = tl.load(
        q + (head * q_head_stride + row * q_row_stride)[:, None] + (key_at * q_dim_stride)[None, :],
        mask=(member < GROUP)[:, None] & (key_at < KEY_DIM)[None, :],
        other=0.0,
    )
    if UPCAST:
        query = query.to(tl.float32)
    total = tl.zeros((BLOCK_GROUP, BLOCK_VALUE_DIM), dtype=tl.float32)
    norm = tl.zeros((BLOCK_GROUP,), dtype=tl.float32)
    highest = tl.full((BLOCK_GROUP,), float("-inf"), dtype=tl.float32)
    for begin in range(start, stop, BLOCK_KEYS):
        position = begin + tl.arange(0, BLOCK_KEYS)
        visible = position < stop
        key = tl.load(
            keys + (line + position)[None, :] * KEY_DIM + key_at[:, None],
            mask=visible[None, :] & (key_at < KEY_DIM)[:, None],
            other=0.0,
        )
        value = tl.load(
            values + (line + position)[:, None] * VALUE_DIM + value_at[None, :],
            mask=visible[:, None] & (value_at < VALUE_DIM)[None, :],
            other=0.0,
        )
        if UPCAST:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(query, key, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # softcap * tanh(scores / softcap)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        weights, fade = tl.exp(scores - above[:, None]), tl.exp(highest - above)
        norm = norm * fade + tl.sum(weights, 1)
        total = tl.dot(weights.to(value.dtype), value, total * fade[:, None], input_precision="ieee")
        highest = above
    place = (row * KV_HEADS * GROUP + head) * MAX_SPLITS + split
    tl.store(maxima + place, highest, mask=member < GROUP)
    tl.store(norms + place, norm, mask=member < GROUP)
    to = sums + place[:, None] * VALUE_DIM + value_at[None, :]
    tl.store(to, total, mask=(member < GROUP)[:, None] & (value_at < VALUE_DIM)[None, :])


@triton.jit
def _merge(
    sums, maxima, norms, lengths, out,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, WINDOW: tl.constexpr, MAX_SPLITS: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """One head of one row: its pieces' sums on one scale, divided by the norm. A row of no tokens becomes zeros."""
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row)
    visible = length
    if WINDOW:
        visible = tl.minimum(length, WINDOW)
    piece = tl.cdiv(tl.cdiv(visible, MAX_SPLITS), _LEAST_SPLIT) * _LEAST_SPLIT
    split, value_at = tl.arange(0, MAX_SPLITS), tl.arange(0, BLOCK_VALUE_DIM)
    used = split * piece < visible
    place = (row * HEADS + head) * MAX_SPLITS + split
    highest = tl.load(maxima + place, mask=used, other=float("-inf"))
    weights = tl.where(used, tl.exp(highest - tl.maximum(tl.max(highest, 0), -1e30)), 0.0)
    norm = tl.sum(weights * tl.load(norms + place, mask=used, other=0.0), 0)
    parts = tl.load(
        sums + place[:, None] * VALUE_DIM + value_at[None, :],
        mask=used[:, None] & (value_at < VALUE_DIM)[None, :],
        other=0.0,
    )
    result = tl.sum(weights[:, None] * parts, 0) / tl.where(length == 0, 1.0, norm)
    to = out + (row * HEADS + head) * VALUE_DIM + value_at
    tl.store(to, result.to(out.dtype.element_ty), mask=value_at < VALUE_DIM)
