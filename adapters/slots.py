"""Which adapters are in the device's slots: pinned, filled, fetched ahead and evicted. Knows no request and no store.

The engine's thread owns the slots; adapters reach host memory by the threads of `host_cache`, so requests for others
never wait. An adapter's identity is its content digest, everywhere. A slot with references is pinned: a running
sequence still uses it, and nothing may be loaded over it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from adapters.errors import AdapterFormatError, NoFreeSlotError
from adapters.host_cache import HostCache
from adapters.lora import BatchedLoraLinear, SlotTable
from adapters.prepared import RANK_STEP, PreparedAdapter, padded_rank
from adapters.slot_observer import SlotObserver


class AdapterSlots:
    """The slot tables of all sites, and who is in them. Not thread-safe: the engine's thread owns it."""

    def __init__(
        self,
        sites: Iterable[BatchedLoraLinear],
        *,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
        host: HostCache,
        observer: SlotObserver,
    ) -> None:
        self.num_slots = num_slots
        self.max_rank = max_rank
        self._sites = list(dict.fromkeys(sites))
        self.tables: dict[BatchedLoraLinear, SlotTable] = {}
        self._dtype, self._device = dtype, device
        self._host = host
        self._observer = observer
        self._copies = _LoadStream(device)
        self._rank = RANK_STEP
        self._slot_of: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._references: dict[str, int] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._retired: set[str] = set()
        self._wanted: Mapping[str, int] = {}  # by waiting requests; 0 is the soonest
        self.may_fetch_more = False
        """Whether the last `prefetch` filled a slot, so that another may find one to fill."""
        self._closing: dict[str, str] = {}  # digest in a slot -> digest for which that slot is kept
        self._resident: tuple[str, ...] | None = ()

    def acquire(self, digest: str) -> int | None:
        """Pin an adapter and return its slot; None while it is being fetched into host memory.

        Raises:
            NoFreeSlotError: every slot is pinned, or kept for those that have waited long enough.
            AdapterError: the adapter cannot be loaded.
        """
        slot = self._slot_of.get(digest)
        if slot is None:
            adapter = self._host.get(digest)
            if adapter is None:
                return None
            slot = self._fill(digest, adapter)
        elif digest in self._closing:
            raise NoFreeSlotError("the adapter's slot is kept for another one")
        self._copies.wait_for(digest)
        self._slot_of.move_to_end(digest)
        self._references[digest] = self._references.get(digest, 0) + 1
        return slot

    def release(self, digest: str) -> None:
        """Undo one `acquire`. A retired adapter leaves its slot with its last reference."""
        self._references[digest] -= 1
        if self._references[digest] == 0:
            del self._references[digest]
            if digest in self._retired:
                self._evict(digest, "deleted")

    def prefetch(self, digests: Sequence[str]) -> None:
        """What waiting requests will need, soonest first: on its way to host memory, and one of it into a slot.

        One, because this is the engine's thread. It takes a slot only from an adapter that no request wants sooner.
        """
        self._wanted = {digest: place for place, digest in enumerate(digests)}
        self.may_fetch_more = False
        for digest in self._host.prefetch([digest for digest in digests if digest not in self._slot_of]):
            if self._victim(digest, self._wanted[digest]) is None and not self._free:
                return
            adapter = self._host.get(digest)
            if adapter is not None and adapter.max_rank <= self.max_rank:
                self._fill(digest, adapter, ahead=True)
                self.may_fetch_more = True
                return

    def keep_for(self, starving: Sequence[str]) -> None:
        """Close a slot for each of these adapters: nobody new may use it until one of them has got it.

        Of the pinned ones those with the fewest references, which are empty soonest. Replaces the earlier call.
        """
        kept = {new: old for old, new in self._closing.items() if old in self._slot_of}
        self._closing = {kept[new]: new for new in starving if new in kept}
        for new in starving:
            if new in kept or new in self._slot_of:
                continue
            open_ones = [d for d in self._references if d not in self._closing and d not in starving]
            if not open_ones:
                return
            self._closing[min(open_ones, key=lambda d: self._references[d])] = new

    def retire(self, digest: str) -> None:
        """Forget a deleted adapter: at once when idle, else when its last sequence ends."""
        self._host.drop(digest)
        if digest not in self._slot_of:
            return
        if digest in self._references:
            self._retired.add(digest)
        else:
            self._evict(digest, "deleted")

    def resident(self) -> tuple[str, ...]:
        """Digests that hold a slot; made anew only after a change."""
        if self._resident is None:
            self._resident = tuple(self._slot_of)
        return self._resident

    def references(self) -> dict[str, int]:
        """How many running sequences pin each adapter."""
        return dict(self._references)

    def close(self) -> None:
        """Give the memory of all slots back."""
        self.tables.clear()

    def _fill(self, digest: str, adapter: PreparedAdapter, ahead: bool = False) -> int:
        start = time.monotonic()
        if adapter.max_rank > self.max_rank:
            raise AdapterFormatError(f"rank {adapter.max_rank} is above {self.max_rank}", check="rank")
        if not self._free:
            victim = self._victim(digest, self._wanted[digest] if ahead else -1)
            if victim is None:
                raise NoFreeSlotError(f"all {self.num_slots} adapter slots are in use")
            self._evict(victim, "capacity")
        self._fit_rank(padded_rank(adapter.max_rank))
        for site in self._sites:
            if site not in self.tables and site in adapter.sites:
                self.tables[site] = self._new_table(site)
        slot = self._free.pop()
        with self._copies.copying(digest):
            for site, table in self.tables.items():
                table.load(slot, adapter.sites.get(site))
        self._slot_of[digest] = slot
        self._resident = None
        self._observer.adapter_loaded("device", time.monotonic() - start)
        return slot

    def _victim(self, digest: str, place: int) -> str | None:
        """Whose slot `digest` may take: one kept for it, else the least recently used, rather one nobody waits for.

        `place` in the queue protects what is wanted sooner; -1 is now.
        """
        idle = [d for d in self._slot_of if d not in self._references and self._closing.get(d, digest) == digest]
        for candidate in idle:
            if candidate in self._closing or candidate not in self._wanted:
                return candidate
        last = max(idle, key=lambda d: self._wanted[d], default=None)
        return last if last is not None and self._wanted[last] > place else None

    def _evict(self, digest: str, reason: str) -> None:
        self._free.append(self._slot_of.pop(digest))
        self._retired.discard(digest)
        self._closing.pop(digest, None)
        self._copies.forget(digest)
        self._resident = None
        self._observer.adapter_evicted(reason)

    def _fit_rank(self, rank: int) -> None:
        """Tables are as wide as the widest adapter seen, not as the widest allowed: zeros cost time too."""
        if rank <= self._rank:
            return
        self._rank = rank
        for site, narrow in self.tables.items():
            self.tables[site] = self._new_table(site)
            self.tables[site].copy_from(narrow)

    def _new_table(self, site: BatchedLoraLinear) -> SlotTable:
        return SlotTable(site, self.num_slots, self._rank, self._dtype, self._device)


class _LoadStream:
    """On CUDA, slots are filled on a stream of their own while the device decodes; on CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._arriving: dict[str, torch.cuda.Event] = {}

    @contextmanager
    def copying(self, digest: str) -> Iterator[None]:
        """What is copied inside the block arrives in the background; what was computed before may still read."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        self._arriving[digest] = self._stream.record_event()

    def forget(self, digest: str) -> None:
        self._arriving.pop(digest, None)

    def wait_for(self, digest: str) -> None:
        """The device, not this thread, waits for the adapter before it computes anything further."""
        if event := self._arriving.pop(digest, None):
            torch.cuda.current_stream(self._device).wait_event(event)
