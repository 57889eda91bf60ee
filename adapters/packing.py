"""Sequences side by side in one flat row `[1, tokens]`, each seeing only itself. Knows no model and no loss.

Linear layers see no padding at all. Attention, which asks `current_pack()`, works per sequence: `PackedBatch.pad`
lays the rows out as `[sequences, width]` for a plain causal kernel, `unpad` takes them back. Padding stands
behind a sequence, so under a causal mask no real row ever attends to it and its gradient is exactly zero.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

LENGTH_STEP = 16
"""Attention is laid out in multiples of it: its kernels are compiled and kept for each length that they meet."""


class PackedBatch:
    """How a flat row is divided: `lengths` tokens belong to the first, second, … sequence."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError("a pack needs sequences of at least one token")
        self.lengths = list(lengths)
        self.num_tokens = sum(lengths)
        self.width = max(lengths) + -max(lengths) % LENGTH_STEP
        self.even = min(lengths) == self.width
        sizes = torch.tensor(self.lengths)
        starts = torch.cumsum(sizes, 0) - sizes
        columns = torch.arange(self.width)
        real = columns < sizes[:, None]
        padded = torch.where(real, starts[:, None] + columns, starts[:, None])
        #: [1, tokens], restarting at every sequence
        self.position_ids = columns.expand(len(lengths), -1)[real][None].to(device)
        #: [sequences * width] -> row of the flat layout; padding repeats its sequence's first row
        self.pad_index = padded.reshape(-1).to(device)
        #: [tokens] -> row of the padded layout
        self.unpad_index = real.reshape(-1).nonzero().squeeze(1).to(device)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """x: [1, heads, tokens, dim] -> [sequences, heads, width, dim]."""
        rows = x.transpose(1, 2)[0]
        if not self.even:
            rows = _Pad.apply(rows, self.pad_index, self.unpad_index)  # type: ignore[no-untyped-call]
        return rows.reshape(len(self.lengths), self.width, *rows.shape[1:]).transpose(1, 2)

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """x: [sequences, heads, width, dim] -> [1, tokens, heads, dim] (the layout an attention returns)."""
        rows = x.transpose(1, 2).flatten(0, 1)
        if not self.even:
            rows = _Unpad.apply(rows, self.unpad_index)  # type: ignore[no-untyped-call]
        return rows[None]


class JointPack:
    """Packs of several owners side by side in one flat row; attention takes each as if it were alone.

    So a pack's shapes, and with them its rounding, do not depend on who is beside it.
    """

    def __init__(self, parts: Sequence[PackedBatch]) -> None:
        self.parts = list(parts)
        self.sizes = [part.num_tokens for part in self.parts]
        #: [1, tokens], restarting at every sequence
        self.position_ids = torch.cat([part.position_ids for part in self.parts], dim=1)


class _Pad(torch.autograd.Function):
    """Gather rows into the padded layout. Backward drops the padding's gradient: it is zero, see the module."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, pad_index: torch.Tensor, unpad_index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(unpad_index)
        return rows.index_select(0, pad_index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (unpad_index,) = ctx.saved_tensors
        return grad.index_select(0, unpad_index), None, None


class _Unpad(torch.autograd.Function):
    """Take the real rows out of the padded layout."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, unpad_index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(unpad_index)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, unpad_index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (unpad_index,) = ctx.saved_tensors
        padded = grad.new_zeros(ctx.num_rows, *grad.shape[1:])
        return padded.index_copy_(0, unpad_index, grad), None


_current = threading.local()


def current_pack() -> PackedBatch | JointPack | None:
    """The pack this thread is computing, or None: other threads are not concerned."""
    pack: PackedBatch | JointPack | None = getattr(_current, "pack", None)
    return pack


@contextmanager
def packed_sequences(lengths: Sequence[int], device: torch.device | str = "cpu") -> Iterator[PackedBatch]:
    """Inside the block this thread's forwards are over one flat row of sequences with these lengths.

    Call the model with `position_ids=pack.position_ids` and `use_cache=False`.
    """
    pack = PackedBatch(lengths, device)
    with packed_as(pack):
        yield pack


@contextmanager
def packed_as(pack: PackedBatch | JointPack | None) -> Iterator[None]:
    """Inside the block this thread's forwards are over the rows of this very pack; None: over plain batches."""
    before = current_pack()
    _current.pack = pack
    try:
        yield
    finally:
        _current.pack = before


def bounded_slices(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Divide sequences (by index) into packs that one uninterrupted forward-backward may take.

    Similar lengths go together, and a pack's padded size stays below 2 x `max_tokens`. A single sequence longer
    than `max_tokens` is a pack of its own.
    """
    slices: list[list[int]] = []
    tokens = longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fits = slices and tokens + length <= max_tokens and longest * (len(slices[-1]) + 1) <= 2 * max_tokens
        if not fits:
            slices.append([])
            tokens, longest = 0, length
        slices[-1].append(index)
        tokens += length
    return slices
