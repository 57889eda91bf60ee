"""The kernels' work in plain tensor operations that never look at a value, so that a tape can record them. Slow."""

from __future__ import annotations

import torch

from adapters.lora import SlotTable
from service.engine.decode_attention import DecodeRows
from service.engine.kv_cache import LayerBuffer


class PlainDecoding:
    """`DecodeKernels` over the whole cache."""

    def store(self, rows: DecodeRows, buffer: LayerBuffer, k: torch.Tensor, v: torch.Tensor) -> None:
        head = _arange(buffer.num_kv_heads, rows.first)[:, None]
        lines = rows.first * buffer.num_kv_heads + head * rows.capacity + rows.lengths - 1  # [kv_heads, rows]
        lines = torch.where(rows.lengths > 0, lines, -1).reshape(-1)
        for tensor, new in ((buffer.keys, k), (buffer.values, v)):
            hit = lines[:, None] == _arange(tensor.shape[0], rows.first)
            tensor.copy_(torch.where(hit.any(0)[:, None], hit.to(new.dtype).T @ new.reshape(-1, new.shape[-1]), tensor))

    def attend(
        self,
        rows: DecodeRows,
        buffer: LayerBuffer,
        q: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        assert window is None and softcap is None
        at = _arange(buffer.keys.shape[0] // buffer.num_kv_heads, rows.first)
        visible = (at < rows.lengths[:, None])[:, None, None]  # [rows, 1, 1, tokens]
        first = rows.first[:, None, None] * buffer.num_kv_heads
        lines = first + _arange(buffer.num_kv_heads, rows.first)[:, None] * rows.capacity[:, None, None] + at
        lines = lines.clamp(max=buffer.keys.shape[0] - 1)
        query = q.transpose(0, 1).unflatten(1, (buffer.num_kv_heads, -1))  # [rows, kv_heads, group, dim]
        scores = (query @ buffer.keys[lines].transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
        return (torch.softmax(scores, dim=-1).nan_to_num() @ buffer.values[lines]).flatten(1, 2)


def plain_add_lora(table: SlotTable, tiles: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """`AddLora`, with every slot's product for every row."""
    slots, starts, lengths = tiles[:, :, None]
    row = _arange(x.shape[0], x)
    inside = (row >= starts) & (row < starts + lengths)  # [tiles, rows]
    slot = (inside * slots).sum(0)
    hidden = torch.einsum("ni,nri->nr", x, table.a[slot]) * inside.any(0)[:, None]
    for bank in table.banks:
        part = hidden[:, bank.parts[0] * table.r : (bank.parts[-1] + 1) * table.r].unflatten(1, (-1, table.r))
        update = torch.einsum("npr,npro->npo", part, bank.b[slot]).flatten(1)
        y[:, bank.span[0] : bank.span[1]] += update


def _arange(stop: int, beside: torch.Tensor) -> torch.Tensor:
    return torch.arange(stop, device=beside.device)
