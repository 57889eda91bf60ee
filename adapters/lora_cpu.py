"""The LoRA update on CPU, in one compiled pass over the rows of a site.

    y[i, part] += (x[i] A[s[i], part]) B[s[i], part]

A single row reads its own adapter once, whatever the others use: the cost is the bytes of the adapters, so rows with
one adapter and rows with thirty-two cost nearly the same. Rows of one prefill chunk go four at a time. Sums are
float32, and a row's result depends on nothing but itself and its chunk.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from adapters.jit import array, kernel, narrow, widen

UNROLL = 4
"""Ranks that are added together; a table's rank is a multiple of it."""

BLOCK = 4
"""Rows of a prefill chunk that are computed together."""


@numba.njit(inline="always")
def whole(rank):
    """The rank with as many lines of zeros as make whole groups."""
    return (rank + UNROLL - 1) // UNROLL * UNROLL


@kernel
def add_rows(x, y, slots, ranks, a, b, first_part, first_column):
    """One bank of a slot table, in place.

    x: [rows, in], y: [rows, out], slots: int32 [rows] with -1 for no adapter, ranks: [slots, parts],
    a: [slots, parts * r, in], b: [slots, bank's parts, r, width].

    `a` is read line by line and `b` four lines at once: what the prefetchers and the vector registers like best.
    """
    parts, r, width = b.shape[1], b.shape[2], b.shape[3]
    for row in numba.prange(x.shape[0]):
        slot = slots[row]
        if slot >= 0:
            wide = np.empty(x.shape[1], np.float32)
            for c in range(wide.shape[0]):
                wide[c] = widen(x[row, c])
            h = np.empty(parts * r, np.float32)
            for part in range(parts):
                for k in range(whole(ranks[slot, first_part + part])):
                    line = a[slot, (first_part + part) * r + k]
                    dot = np.float32(0)
                    for c in range(wide.shape[0]):
                        dot += wide[c] * widen(line[c])
                    h[part * r + k] = dot
            total = np.empty(width, np.float32)
            for part in range(parts):
                first = first_column + part * width
                out = y[row, first : first + width]
                for c in range(width):
                    total[c] = widen(out[c])
                for k in range(0, whole(ranks[slot, first_part + part]), UNROLL):
                    b0, b1, b2, b3 = b[slot, part, k], b[slot, part, k + 1], b[slot, part, k + 2], b[slot, part, k + 3]
                    j = part * r + k
                    h0, h1, h2, h3 = h[j], h[j + 1], h[j + 2], h[j + 3]
                    for c in range(width):
                        total[c] += h0 * widen(b0[c]) + h1 * widen(b1[c]) + h2 * widen(b2[c]) + h3 * widen(b3[c])
                for c in range(width):
                    out[c] = narrow(total[c], out[c])


@kernel
def add_blocks(x, y, starts, counts, slots, ranks, a, b, first_part, first_column):
    """The same for blocks of up to `BLOCK` neighbouring rows of one slot; starts, counts, slots: [blocks].

    A short block is filled with its first row, whose extra results go nowhere.
    """
    parts, r, width = b.shape[1], b.shape[2], b.shape[3]
    features = x.shape[1]
    for block in numba.prange(starts.shape[0]):
        slot, start, count = slots[block], starts[block], counts[block]
        wide = np.empty((BLOCK, features), np.float32)
        for i in range(BLOCK):
            row, into = x[start + (i if i < count else 0)], wide[i]
            for c in range(features):
                into[c] = widen(row[c])
        w0, w1, w2, w3 = wide[0], wide[1], wide[2], wide[3]
        h = np.empty((BLOCK, parts * r), np.float32)
        for part in range(parts):
            for k in range(whole(ranks[slot, first_part + part])):
                line = a[slot, (first_part + part) * r + k]
                d0 = d1 = d2 = d3 = np.float32(0)
                for c in range(features):
                    value = widen(line[c])
                    d0 += w0[c] * value
                    d1 += w1[c] * value
                    d2 += w2[c] * value
                    d3 += w3[c] * value
                h[0, part * r + k], h[1, part * r + k], h[2, part * r + k], h[3, part * r + k] = d0, d1, d2, d3
        total = np.empty((BLOCK, width), np.float32)
        for part in range(parts):
            first = first_column + part * width
            for i in range(count):
                out, into = y[start + i, first : first + width], total[i]
                for c in range(width):
                    into[c] = widen(out[c])
            for k in range(0, whole(ranks[slot, first_part + part]), UNROLL):
                b0, b1, b2, b3 = b[slot, part, k], b[slot, part, k + 1], b[slot, part, k + 2], b[slot, part, k + 3]
                j = part * r + k
                for i in range(count):
                    h0, h1, h2, h3 = h[i, j], h[i, j + 1], h[i, j + 2], h[i, j + 3]
                    into = total[i]
                    for c in range(width):
                        into[c] += h0 * widen(b0[c]) + h1 * widen(b1[c]) + h2 * widen(b2[c]) + h3 * widen(b3[c])
            for i in range(count):
                out, into = y[start + i, first : first + width], total[i]
                for c in range(width):
                    out[c] = narrow(into[c], out[c])


def compile_kernels(dtype: torch.dtype) -> None:
    """Now rather than in somebody's request; a few seconds unless they were kept from the last time."""
    x, y, a = (array(torch.zeros(1, UNROLL, dtype=dtype)) for _ in range(3))
    b = array(torch.zeros(1, 1, UNROLL, UNROLL, dtype=dtype))
    where = (np.zeros((1, 1), np.int64), a[None].repeat(UNROLL, axis=1), b, 0, 0)
    add_rows(x, y, np.zeros(1, np.int32), *where)
    add_blocks(x, y, np.zeros(1, np.int64), np.ones(1, np.int64), np.zeros(1, np.int64), *where)
