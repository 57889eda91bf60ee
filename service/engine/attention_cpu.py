"""Attention of decode tokens on CPU, one compiled pass: store the new key and value, look at the row's own tokens.

Work is that of the tokens really there: nothing is padded, masked or gathered. Scores, softmax and sums are float32.
A row is computed alone: its result depends on nothing but itself. Knows lines of a buffer, not sequences.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from adapters.jit import array, exp_of_negative, kernel, narrow, widen

_UNROLL = 4
"""Values that are added together."""


@kernel
def decode_rows(q, k, v, keys, values, starts, capacities, lengths, out, scale, window, softcap):
    """out[i, h] = softmax(scale q[i, h] K[i].T) V[i], keys and values of token lengths[i] - 1 having been stored.

    q: [rows, heads, dim], k: [rows, kv_heads, dim], v: [rows, kv_heads, value_dim], out: [rows, heads, value_dim],
    keys: [lines, dim], values: [lines, value_dim]; row i's head h has its lines from
    starts[i] * kv_heads + h * capacities[i] on. `window` 0 is all tokens, `softcap` 0 is none.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    group = heads // kv_heads
    dim, value_dim = q.shape[2], v.shape[2]
    for task in numba.prange(q.shape[0] * kv_heads):
        row, kv_head = task // kv_heads, task % kv_heads
        length = lengths[row]
        line = starts[row] * kv_heads + kv_head * capacities[row]
        new, stored = k[row, kv_head], keys[line + length - 1]
        for c in range(dim):
            stored[c] = new[c]
        new, stored = v[row, kv_head], values[line + length - 1]
        for c in range(value_dim):
            stored[c] = new[c]
        first = max(0, length - window) if window > 0 else 0
        count = length - first
        line += first
        scores = np.empty(count, np.float32)
        query = np.empty(dim, np.float32)
        total = np.empty(value_dim, np.float32)
        for head in range(kv_head * group, (kv_head + 1) * group):
            asked = q[row, head]
            for c in range(dim):
                query[c] = widen(asked[c]) * np.float32(scale)
            for j in range(count):
                key = keys[line + j]
                dot = np.float32(0)
                for c in range(dim):
                    dot += query[c] * widen(key[c])
                scores[j] = dot
            if softcap > 0:
                for j in range(count):
                    scores[j] = np.float32(softcap) * np.tanh(scores[j] / np.float32(softcap))
            highest = scores[0]
            for j in range(count):
                highest = max(highest, scores[j])
            weight = np.float32(0)
            for j in range(count):
                scores[j] = exp_of_negative(scores[j] - highest)
                weight += scores[j]
            for c in range(value_dim):
                total[c] = np.float32(0)
            whole = count // _UNROLL * _UNROLL
            for j in range(0, whole, _UNROLL):
                v0, v1, v2, v3 = values[line + j], values[line + j + 1], values[line + j + 2], values[line + j + 3]
                w0, w1, w2, w3 = scores[j], scores[j + 1], scores[j + 2], scores[j + 3]
                for c in range(value_dim):
                    total[c] += w0 * widen(v0[c]) + w1 * widen(v1[c]) + w2 * widen(v2[c]) + w3 * widen(v3[c])
            for j in range(whole, count):
                value = values[line + j]
                for c in range(value_dim):
                    total[c] += scores[j] * widen(value[c])
            answer = out[row, head]
            for c in range(value_dim):
                answer[c] = narrow(total[c] / weight, answer[c])


def compile_kernels(dtype: torch.dtype) -> None:
    """Now rather than in somebody's request; a few seconds unless they were kept from the last time."""
    q, k, v, out = (array(torch.zeros(1, 1, 1, dtype=dtype)) for _ in range(4))
    keys, values = (array(torch.zeros(1, 1, dtype=dtype)) for _ in range(2))
    start, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    decode_rows(q, k, v, keys, values, start, one, one, out, 1.0, 0, 0.0)
