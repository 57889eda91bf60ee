"""What the CPU's compiled kernels share: how they are compiled, and bfloat16 as 16 raw bits. Knows no model.

numba compiles a kernel when it is first called, for the types it is called with, and keeps the result beside the
source or in NUMBA_CACHE_DIR, where that may be written. Kernels release the GIL and split their rows over threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

_config: Any = numba.config
_config.THREADING_LAYER = "threadsafe"  # OpenMP, which torch has loaded; never the layer that dies of two callers
_intrinsic: Any = intrinsic

DTYPES = frozenset({torch.float32, torch.bfloat16})
"""What the kernels compute on; everything is accumulated in float32."""

_FASTMATH = {"reassoc", "contract"}
"""Sums may be reordered, as vectorizing needs. The order depends on sizes alone, never on other rows.

No more than that: with `nsz` a kernel just compiled and the same one read from the cache, which LLVM has optimized once
more, differed in last bits.
"""


def kernel(function: Callable[..., None]) -> Any:
    """Compile `function` in parallel, without the GIL."""
    kept = "NUMBA_CACHE_DIR" in os.environ or os.access(Path(function.__code__.co_filename).parent, os.W_OK)
    return numba.njit(parallel=True, fastmath=_FASTMATH, nogil=True, cache=kept)(function)


def array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same memory for a kernel; bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@_intrinsic
def _as_float(_context: Any, _bits: Any) -> Any:
    def generate(_ctx: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@_intrinsic
def _as_bits(_context: Any, _value: Any) -> Any:
    def generate(_ctx: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def widen(value):
    """An array's element as float32; inside kernels only."""
    raise NotImplementedError


@overload(widen, inline="always")
def _widen(value):
    if value == types.uint16:
        return lambda value: _as_float(np.uint32(np.uint32(value) << np.uint32(16)))
    return lambda value: value


def narrow(value, like):
    """A float32 as an element of `like`'s array, rounded to the nearest, ties to even; inside kernels only."""
    raise NotImplementedError


@overload(narrow, inline="always")
def _narrow(value, like):
    if like == types.uint16:
        return lambda value, like: _round(value)
    return lambda value, like: value


@numba.njit(inline="always")
def _round(value):
    bits = _as_bits(np.float32(value))
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


@numba.njit(inline="always")
def exp_of_negative(x):
    """e**x for x <= 0 within 2e-7, in operations that vectorize: 2**n times a polynomial of the rest (Cephes)."""
    z = max(x, np.float32(-87.0)) * np.float32(1.44269504)
    n = np.floor(z + np.float32(0.5))
    f = z - n
    p = np.float32(0.0001540353) * f + np.float32(0.00133335581)
    p = p * f + np.float32(0.00961812911)
    p = p * f + np.float32(0.0555041087)
    p = p * f + np.float32(0.240226507)
    p = p * f + np.float32(0.693147181)
    p = p * f + np.float32(1.0)
    return p * _as_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))
