"""A safetensors file that is in memory: its header, checked by the library, and its tensors. Knows no adapter.

The library opens files by path, and what lies under a path may change between two looks at it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, deserialize

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorFile:
    """Raises SafetensorError for bytes that are no safetensors file; nothing is allocated by what a header claims."""

    def __init__(self, data: bytes) -> None:
        self._entries: dict[str, Mapping[str, Any]] = dict(deserialize(data))  # type: ignore[no-untyped-call]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        self.metadata: Mapping[str, str] = header.get("__metadata__") or {}

    def keys(self) -> Iterable[str]:
        return self._entries.keys()

    def shape(self, key: str) -> Sequence[int]:
        shape: Sequence[int] = self._entries[key]["shape"]
        return shape

    def dtype(self, key: str) -> str:
        """In safetensors' words: F32, BF16, …"""
        return str(self._entries[key]["dtype"])

    def tensor(self, key: str) -> torch.Tensor:
        """Floats only."""
        dtype = _DTYPES.get(self.dtype(key))
        if dtype is None:
            raise SafetensorError(f"{key} has dtype {self.dtype(key)}")
        shape, data = list(self.shape(key)), self._entries[key]["data"]
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if len(data) else torch.empty(shape, dtype=dtype)
