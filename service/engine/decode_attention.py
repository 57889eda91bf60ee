"""Attention of decode rows by kernels that read places and lengths on the device. Knows no kernel and no scheduling.

With it a step on CUDA needs no mask, no gather and no order of rows, and a CUDA graph can be replayed for other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from service.engine.kv_cache import KvCache, LayerBuffer, Row
from service.engine.step_attention import StepAttention


@dataclass(frozen=True)
class DecodeRows:
    """Where each decode row's keys are: int64 [rows] each, on the cache's device.

    first: tokens of the cache before the sequence's row; capacity: tokens of that row; lengths: tokens visible,
    the new one included. A row of length 0 only pads the batch: nothing is stored for it and its output is zero.
    """

    first: torch.Tensor
    capacity: torch.Tensor
    lengths: torch.Tensor

    def __len__(self) -> int:
        return self.first.shape[0]

    @classmethod
    def of(cls, cache: KvCache, rows: Sequence[Row], positions: Sequence[int]) -> DecodeRows:
        """For tokens at these positions of these cache rows."""
        table = [[cache.first_token(row), row.capacity, at + 1] for row, at in zip(rows, positions, strict=True)]
        return cls(*torch.tensor(table, dtype=torch.int64).T.contiguous().to(cache.device, non_blocking=True))


class DecodeKernels(Protocol):
    """The two operations of a layer on decode rows. Row invariant: no row's bits depend on the other rows."""

    def store(self, rows: DecodeRows, buffer: LayerBuffer, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put each row's new key and value into the cache; k, v: [kv_heads, rows, dim]."""

    def attend(
        self,
        rows: DecodeRows,
        buffer: LayerBuffer,
        q: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Each row over its visible keys; q: [heads, rows, dim] -> [rows, heads, value_dim]."""


@dataclass(frozen=True)
class DecodeAttention:
    """One step: prefill chunks, if any, then decode rows from token `decode_start` on, if any."""

    layers: Sequence[LayerBuffer]
    kernels: DecodeKernels
    rows: DecodeRows | None
    prefill: StepAttention | None = None
    decode_start: int = 0

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
        outputs, at = [], self.decode_start
        if self.prefill is not None:
            outputs.append(self.prefill.attend(layer, q[:, :at], k[:, :at], v[:, :at], scale, window, softcap))
        if self.rows is not None:
            buffer = self.layers[layer]
            self.kernels.store(self.rows, buffer, k[:, at:], v[:, at:])
            outputs.append(self.kernels.attend(self.rows, buffer, q[:, at:], scale, window, softcap))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
