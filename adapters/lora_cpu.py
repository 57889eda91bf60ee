"""The LoRA update of single rows on CPU: each row reads its own adapter once, whatever the others use.

    y[i, part] += (x[i] A[s[i], part]) B[s[i], part]        in one compiled pass

The cost is the bytes of the adapters in use, so rows with one adapter and rows with thirty-two cost nearly the same.
A row is computed alone and in float32: its result depends on nothing but itself.
"""

from __future__ import annotations

import numba
import numpy as np

from adapters.jit import kernel, narrow, widen

UNROLL = 4
"""Ranks that are added together; a table's rank is a multiple of it."""


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
