"""LoRA for many at once: every row of a batch may use another adapter, or none, on one frozen base.

    y[i] = x[i] W.T + b  +  (x[i] A[s[i]]) B[s[i]]          s[i]: row i's slot (scaling is folded into B)

Each linear layer of the base (siblings such as q/k/v fused) is a `BatchedLoraLinear`, a *site*. What a site adds
depends on the routing of the *calling thread*, so serving and training use the same modules at once and no
global state is switched. Punica's S-LoRA (arXiv 2310.18547, 2311.03285) is the model of the slot tables.

Row invariance: a decode row is always a [1, in] x [in, r] product of a batched matmul, and a prefill chunk always
a product of its own rows only. So what a row gets never depends on who else is in the batch. Knows no files.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import nn

from adapters.peft_format import LoraPair


@dataclass(frozen=True)
class LoraPart:
    """One linear layer of the original model within a fused site."""

    name: str
    out_features: int


class Routing(Protocol):
    """What the current thread wants added to the base's output."""

    def apply(self, site: BatchedLoraLinear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor: ...


_current = threading.local()


@contextmanager
def routing(route: Routing | None) -> Iterator[None]:
    """Every site called in this thread inside the block adds what `route` says."""
    before = getattr(_current, "route", None)
    _current.route = route
    try:
        yield
    finally:
        _current.route = before


class SlotTable:
    """One site's adapters, stacked: a: [slots, parts * r, in], b[part]: [slots, r, out of the part].

    Ranks below `r` are padded with zeros, and so are parts and slots that an adapter does not touch.
    """

    def __init__(self, site: BatchedLoraLinear, num_slots: int, r: int, dtype: torch.dtype, device: torch.device):
        self.r = r
        self.part_names = [part.name for part in site.parts]
        self.a = torch.zeros(num_slots, len(site.parts) * r, site.in_features, dtype=dtype, device=device)
        self.b = [torch.zeros(num_slots, r, p.out_features, dtype=dtype, device=device) for p in site.parts]

    def load(self, slot: int, modules: Mapping[str, LoraPair]) -> None:
        """Fill a slot; parts without a pair become zero."""
        for index, name in enumerate(self.part_names):
            rows = self.a[slot, index * self.r : (index + 1) * self.r].zero_()
            columns = self.b[index][slot].zero_()
            if pair := modules.get(name):
                rank = pair.a.shape[0]
                rows[:rank].copy_(pair.a)
                columns[:rank].copy_(pair.b.T * pair.scaling)

    def copy_from(self, other: SlotTable) -> None:
        """Take over all slots of a table of smaller rank."""
        for index in range(len(self.b)):
            rows = other.a[:, index * other.r : (index + 1) * other.r]
            self.a[:, index * self.r : index * self.r + other.r].copy_(rows)
            self.b[index][:, : other.r].copy_(other.b[index])


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
class Run:
    """Consecutive rows of a batch that one matmul can serve.

    `slots` is a range: one slot per row (distinct adapters side by side), or a single slot for all rows.
    `chunk` marks the rows of one sequence's prefill chunk, which are multiplied together.
    """

    start: int
    stop: int
    slots: range
    chunk: bool = False

    def shifted(self, rows: int) -> Run:
        """The same run, `rows` further down the batch."""
        return Run(self.start + rows, self.stop + rows, self.slots, self.chunk)


def plan_rows(slots: Sequence[int | None]) -> list[Run]:
    """Runs for single rows with these slots: equal slots together, or consecutive ones. None is no adapter.

    Rows in ascending slot order give the fewest runs; any order is right.
    """
    runs: list[Run] = []
    for row, slot in enumerate(slots):
        if slot is None:
            continue
        last = runs[-1] if runs else None
        if last is not None and last.stop == row:
            if len(last.slots) == 1 and last.slots[0] == slot:
                runs[-1] = Run(last.start, row + 1, last.slots)
                continue
            if len(last.slots) == row - last.start and last.slots[-1] + 1 == slot:
                runs[-1] = Run(last.start, row + 1, range(last.slots[0], slot + 1))
                continue
        runs.append(Run(row, row + 1, range(slot, slot + 1)))
    return runs


@dataclass(frozen=True)
class SlotRouting:
    """Serving: which slots the rows of this step use. The output head sees other rows than the layers do.

    `tables` lacks a site that no resident adapter touches.
    """

    tables: Mapping[BatchedLoraLinear, SlotTable]
    body: Sequence[Run]
    head: Sequence[Run]

    def apply(self, site: BatchedLoraLinear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add the adapters in place; x: [..., tokens, in], y: [..., tokens, out]."""
        runs = self.head if site.is_head else self.body
        table = self.tables.get(site)
        if table is None or not runs:
            return y
        x, rows = x.reshape(-1, x.shape[-1]).to(table.a.dtype), y.view(-1, y.shape[-1])
        for run in runs:
            _add_run(run, table, site.spans, x[run.start : run.stop], rows[run.start : run.stop])
        return y


def _add_run(run: Run, table: SlotTable, spans: list[tuple[int, int]], x: torch.Tensor, y: torch.Tensor) -> None:
    """y: [rows, out] += (x A) B for the rows of one run; x: [rows, in]."""
    first, r = run.slots[0], table.r
    if run.chunk:
        h = x @ table.a[first].T
        for index, (start, stop) in enumerate(spans):
            y[:, start:stop] += h[:, index * r : (index + 1) * r] @ table.b[index][first]
        return
    used = slice(first, first + len(run.slots))
    num_rows = x.shape[0]
    a = table.a[used].transpose(1, 2).expand(num_rows, -1, -1)
    h = torch.bmm(x.unsqueeze(1), a)
    for index, (start, stop) in enumerate(spans):
        b = table.b[index][used].expand(num_rows, -1, -1)
        y[:, start:stop] += torch.bmm(h[:, :, index * r : (index + 1) * r], b).squeeze(1)
