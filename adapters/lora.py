"""LoRA for many at once: every row of a batch may use another adapter, or none, on one frozen base.

    y[i] = x[i] W.T + b  +  (x[i] A[s[i]]) B[s[i]]          s[i]: row i's slot (scaling is folded into B)

Each linear layer of the base (siblings such as q/k/v fused) is a `BatchedLoraLinear`, a *site*. What a site adds
depends on the routing of the *calling thread*, so serving and training use the same modules at once and no
global state is switched. Punica's S-LoRA (arXiv 2310.18547, 2311.03285) is the model of the slot tables.

Row invariance: what a row gets never depends on who else is in the batch. On CPU a compiled pass treats each single row
alone and a prefill chunk for itself; batched products do the same where there is none (see `_add_run`). Knows no files.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Protocol

import numpy as np
import torch
from torch import nn

from adapters import jit
from adapters.lora_cpu import BLOCK, add_blocks, add_rows
from adapters.lora_weights import LoraPair


@dataclass(frozen=True)
class LoraPart:
    """One linear layer of the original model within a fused site."""

    name: str
    out_features: int


class Routing(Protocol):
    """What the current thread wants added to the base's output."""

    def apply(self, site: BatchedLoraLinear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor: ...


_current = threading.local()


def current_route() -> Routing | None:
    """What this thread's forwards add."""
    route: Routing | None = getattr(_current, "route", None)
    return route


@contextmanager
def routing(route: Routing | None) -> Iterator[None]:
    """Every site called in this thread inside the block adds what `route` says."""
    before = getattr(_current, "route", None)
    _current.route = route
    try:
        yield
    finally:
        _current.route = before


@dataclass(frozen=True)
class Bank:
    """Neighbouring parts of equal width, so that one batched product serves them all; b: [slots, parts, r, out]."""

    parts: range
    span: tuple[int, int]
    b: torch.Tensor


class SlotTable:
    """One site's adapters, stacked: a: [slots, parts * r, in], and the parts' b in banks.

    Ranks below `r` are padded with zeros, and so are parts and slots that an adapter does not touch.
    """

    def __init__(
        self, site: BatchedLoraLinear, num_slots: int, r: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.r = r
        self._num_parts = len(site.parts)
        self.a = torch.zeros(num_slots, len(site.parts) * r, site.in_features, dtype=dtype, device=device)
        #: each slot's own rank in each part, 0 where it has none, for kernels that skip the padding
        self.ranks = torch.zeros(num_slots, len(site.parts), dtype=torch.int64, device=device)
        self.banks = []
        for parts in _equally_wide(site):
            span = (site.spans[parts[0]][0], site.spans[parts[-1]][1])
            width = site.parts[parts[0]].out_features
            b = torch.zeros(num_slots, len(parts), r, width, dtype=dtype, device=device)
            self.banks.append(Bank(parts, span, b))
        if device.type == "cpu" and dtype in jit.DTYPES:  # the same memory, as the CPU kernel takes it
            self.a_array, self.rank_array = jit.array(self.a), self.ranks.numpy()
            self.bank_arrays = [jit.array(bank.b) for bank in self.banks]

    def load(self, slot: int, packed: PackedLora | None) -> None:
        """Fill a slot: a few contiguous copies. None is an adapter that leaves this site alone."""
        if packed is None:
            self.ranks[slot].zero_()
            self.a[slot].zero_()
            for bank in self.banks:
                bank.b[slot].zero_()
            return
        r = packed.r
        a = self.a[slot].view(-1, self.r, self.a.shape[-1])  # [parts, r, in]
        self.ranks[slot].copy_(packed.ranks, non_blocking=True)
        a[:, :r].copy_(packed.a, non_blocking=True)
        for bank, b in zip(self.banks, packed.banks, strict=True):
            bank.b[slot, :, :r].copy_(b, non_blocking=True)
        if r < self.r:
            a[:, r:].zero_()
            for bank in self.banks:
                bank.b[slot, :, r:].zero_()

    def copy_from(self, other: SlotTable) -> None:
        """Take over all slots of a table of smaller rank."""
        for part in range(self._num_parts):
            rows = other.a[:, part * other.r : (part + 1) * other.r]
            self.a[:, part * self.r : part * self.r + other.r].copy_(rows)
        self.ranks.copy_(other.ranks)
        for mine, theirs in zip(self.banks, other.banks, strict=True):
            mine.b[:, :, : other.r].copy_(theirs.b)


@dataclass(frozen=True)
class PackedLora:
    """One site's share of an adapter, laid out as in a slot of rank `r`; scaling is folded into b.

    a: [parts, r, in]; of each bank b: [parts, r, out]; ranks: each part's own. Made beside the engine, so that
    filling a slot is only copying.
    """

    r: int
    ranks: torch.Tensor
    a: torch.Tensor
    banks: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.a, *self.banks))

    def pinned(self) -> PackedLora:
        """The same in memory from which a CUDA device copies without waiting."""
        banks = tuple(b.pin_memory() for b in self.banks)
        return PackedLora(self.r, self.ranks.pin_memory(), self.a.pin_memory(), banks)


def pack(site: BatchedLoraLinear, modules: Mapping[str, LoraPair], r: int, dtype: torch.dtype) -> PackedLora | None:
    """What an adapter adds to this site, for a table of rank `r` or more; None when that is nothing."""
    pairs = [modules.get(part.name) for part in site.parts]
    if not any(pairs):
        return None
    a = torch.zeros(len(pairs), r, site.in_features, dtype=dtype)
    banks = []
    for parts in _equally_wide(site):
        b = torch.zeros(len(parts), r, site.parts[parts[0]].out_features, dtype=dtype)
        for place, part in enumerate(parts):
            if pair := pairs[part]:
                rank = pair.a.shape[0]
                a[part, :rank].copy_(pair.a)
                b[place, :rank].copy_(pair.b.T * pair.scaling)
        banks.append(b)
    ranks = torch.tensor([pair.a.shape[0] if pair else 0 for pair in pairs])
    return PackedLora(r, ranks, a, tuple(banks))


def _equally_wide(site: BatchedLoraLinear) -> list[range]:
    """Neighbouring parts of equal width."""
    groups = groupby(range(len(site.parts)), key=lambda index: site.parts[index].out_features)
    parts = [list(group) for _, group in groups]
    return [range(group[0], group[-1] + 1) for group in parts]


class BatchedLoraLinear(nn.Module):
    """A frozen linear layer, or several fused ones, plus whatever LoRA the calling thread's routing adds."""

    def __init__(self, base: nn.Module, in_features: int, parts: tuple[LoraPart, ...], is_head: bool = False) -> None:
        super().__init__()
        self.base = base
        self.in_features = in_features
        self.parts = parts
        self.is_head = is_head
        bounds = [0]
        for part in parts:
            bounds.append(bounds[-1] + part.out_features)
        self.spans = list(pairwise(bounds))
        self._shared = threading.local()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features] -> [..., sum of the parts' out_features]."""
        y: torch.Tensor = self.base(x)
        route: Routing | None = getattr(_current, "route", None)
        return y if route is None else route.apply(self, x, y)

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """This part's slice of forward(x). The first sibling to be called computes for all of them."""
        if len(self.parts) == 1:
            return self.forward(x)
        shared = self._shared
        if getattr(shared, "x", None) is not x:
            shared.x, shared.y, shared.wanted = x, self.forward(x), len(self.parts)
        y: torch.Tensor = shared.y
        shared.wanted -= 1
        if shared.wanted == 0:
            shared.x = shared.y = None
        start, stop = self.spans[index]
        return y[..., start:stop]


class LoraPartView(nn.Module):
    """Stands where an `nn.Linear` of the original model stood."""

    def __init__(self, site: BatchedLoraLinear, index: int) -> None:
        super().__init__()
        self.site = [site]  # in a list: the site is registered once, by `graft`
        self.index = index
        self.in_features = site.in_features
        self.out_features = site.parts[index].out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site[0].part(x, self.index)


def graft(
    model: nn.Module, groups: Iterable[tuple[nn.Module, Sequence[LoraPart], int]], head: str | None = None
) -> dict[str, BatchedLoraLinear]:
    """Replace linear layers by views on sites, in place.

    `groups` holds (frozen base module, its parts in order of the fused output, in_features). Returns each module
    name's site; siblings share one. `head` is the name of the output embedding.
    """
    sites: dict[str, BatchedLoraLinear] = {}
    for base, parts, in_features in groups:
        site = BatchedLoraLinear(base, in_features, tuple(parts), is_head=any(p.name == head for p in parts))
        for index, part in enumerate(parts):
            parent, _, attribute = part.name.rpartition(".")
            view = LoraPartView(site, index)
            if index == 0:
                view.add_module("owner", site)
            setattr(model.get_submodule(parent), attribute, view)
            sites[part.name] = site
    return sites


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of a batch are one sequence's prefill chunk, with an adapter."""

    start: int
    stop: int
    slot: int


class Chunks:
    """The prefill chunks of a step that have an adapter."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks

    @cached_property
    def blocks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First row, number of rows and slot of each block that the CPU kernel computes at once."""
        found = [
            (start, min(BLOCK, chunk.stop - start), chunk.slot)
            for chunk in self.chunks
            for start in range(chunk.start, chunk.stop, BLOCK)
        ]
        starts, counts, slots = np.array(found, dtype=np.int64).T.copy()
        return starts, counts, slots


class RowSlots:
    """The slots of consecutive single rows, from row `start` of a batch on; None is no adapter."""

    def __init__(self, slots: Sequence[int | None], start: int = 0) -> None:
        self.slots = slots
        self.start = start
        #: int32 [rows], -1 for None
        self.indices = np.array([-1 if slot is None else slot for slot in slots], dtype=np.int32)
        self.any = bool((self.indices >= 0).any())

    @cached_property
    def runs(self) -> list[Run]:
        return plan_rows(self.slots)


@dataclass(frozen=True)
class SlotRouting:
    """Serving: which slots the rows of this step use. The output head sees other rows than the layers do.

    `tables` lacks a site that no resident adapter touches.
    """

    tables: Mapping[BatchedLoraLinear, SlotTable]
    chunks: Chunks
    rows: RowSlots
    head: RowSlots

    def apply(self, site: BatchedLoraLinear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add the adapters in place; x: [..., tokens, in], y: [..., tokens, out]."""
        table = self.tables.get(site)
        chunks, rows = (None, self.head) if site.is_head else (self.chunks, self.rows)
        if table is None or not ((chunks and chunks.chunks) or rows.any):
            return y
        x, y_rows = x.reshape(-1, x.shape[-1]).to(table.a.dtype), y.view(-1, y.shape[-1])
        if y.device.type == "cpu" and y.dtype == table.a.dtype and y.dtype in jit.DTYPES:
            _add_compiled(table, chunks, rows, x.contiguous(), y_rows)
        else:
            _add_products(table, chunks, rows, x, y_rows)
        return y


def _add_compiled(table: SlotTable, chunks: Chunks | None, rows: RowSlots, x: torch.Tensor, y: torch.Tensor) -> None:
    """y: [rows, out] += (x A) B, chunk by chunk and row by row; x: [rows, in]."""
    xs, ys = jit.array(x), jit.array(y)
    for bank, b in zip(table.banks, table.bank_arrays, strict=True):
        where = (table.rank_array, table.a_array, b, bank.parts[0], bank.span[0])
        if chunks and chunks.chunks:
            add_blocks(xs, ys, *chunks.blocks, *where)
        if rows.any:
            add_rows(xs[rows.start :], ys[rows.start :], rows.indices, *where)


def _add_products(table: SlotTable, chunks: Chunks | None, rows: RowSlots, x: torch.Tensor, y: torch.Tensor) -> None:
    """The same in batched products, where there is no kernel."""
    for chunk in chunks.chunks if chunks else ():
        span = slice(chunk.start, chunk.stop)
        _multiply(range(chunk.slot, chunk.slot + 1), table, x[span], y[span])
    for run in rows.runs:
        span = slice(rows.start + run.start, rows.start + run.stop)
        _add_run(run, table, x[span], y[span])


@dataclass(frozen=True)
class Run:
    """Consecutive rows that one batched product serves: equally many rows for each of these slots."""

    start: int
    stop: int
    slots: range


def plan_rows(slots: Sequence[int | None]) -> list[Run]:
    """Runs for single rows with these slots; None is no adapter. Ascending slots give the fewest runs."""
    runs: list[Run] = []
    row = 0
    for slot, group in groupby(slots):
        start, row = row, row + len(list(group))
        if slot is None:
            continue
        last = runs[-1] if runs else None
        joins = last is not None and last.stop == start and last.slots[-1] + 1 == slot
        if last is not None and joins and (last.stop - last.start) == (row - start) * len(last.slots):
            runs[-1] = Run(last.start, row, range(last.slots[0], slot + 1))
        else:
            runs.append(Run(start, row, range(slot, slot + 1)))
    return runs


def _add_run(run: Run, table: SlotTable, x: torch.Tensor, y: torch.Tensor) -> None:
    """y: [rows, out] += (x A) B for the rows of one run; x: [rows, in].

    With bfloat16 a row's result does not depend on how many rows are multiplied together. With float32 on CPU it
    does, so there rows are multiplied one by one, side by side for different slots.
    """
    num_slots = len(run.slots)
    per_slot = x.shape[0] // num_slots
    if per_slot == 1 or x.dtype == torch.bfloat16 or x.device.type != "cpu":
        _multiply(run.slots, table, x, y)
    elif num_slots == 1:
        _multiply(run.slots, table, x, y, one_by_one=True)
    else:
        for row in range(per_slot):
            _multiply(run.slots, table, x[row::per_slot], y[row::per_slot])


def _multiply(slots: range, table: SlotTable, x: torch.Tensor, y: torch.Tensor, one_by_one: bool = False) -> None:
    """The products, equally many rows for each slot; `one_by_one` repeats a single slot for each row."""
    used = slice(slots[0], slots[-1] + 1)
    a, num_slots, r = table.a[used], len(slots), table.r
    if one_by_one:
        num_slots = x.shape[0]
        a = a.expand(num_slots, -1, -1)
    per_slot = x.shape[0] // num_slots
    h = torch.bmm(x.reshape(num_slots, per_slot, -1), a.transpose(1, 2))
    for bank in table.banks:
        parts, (start, stop) = len(bank.parts), bank.span
        b = bank.b[used].expand(num_slots, -1, -1, -1)
        hidden = h[:, :, bank.parts[0] * r : (bank.parts[-1] + 1) * r].view(num_slots, per_slot, parts, r)
        hidden = hidden.transpose(1, 2).reshape(num_slots * parts, per_slot, r)
        update = torch.bmm(hidden, b.reshape(num_slots * parts, r, b.shape[-1]))
        update = update.view(num_slots, parts, per_slot, -1).transpose(1, 2)
        y[:, start:stop] += update.reshape(x.shape[0], stop - start)
