"""Which adapters are where: host memory and device slots, loaded, pinned and evicted.

One thread (the engine's) owns the slots; loading from the store into host memory happens in a thread of its own,
so requests for other adapters never wait. An adapter's identity is its content digest, everywhere. A slot with
references is pinned: a running sequence still uses it, and nothing may be loaded over it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from adapters.errors import AdapterError, AdapterFormatError, NoFreeSlotError
from adapters.lora import BatchedLoraLinear, SlotTable
from adapters.peft_format import LoraWeights

_RANK_STEP = 8


class SlotObserver(Protocol):
    """Who wants to know what the slots do. Called from the loading thread or the engine's."""

    def adapter_loaded(self, tier: str, seconds: float) -> None: ...
    def adapter_evicted(self, reason: str) -> None: ...
    def adapter_verify_failed(self, reason: str) -> None: ...


class HostCache:
    """Adapters in host memory, least recently used out first; filled by one loading thread."""

    def __init__(
        self,
        source: Callable[[str], LoraWeights],
        capacity: int,
        observer: SlotObserver,
        on_ready: Callable[[], None],
    ) -> None:
        self._source = source
        self._capacity = capacity
        self._observer = observer
        self._on_ready = on_ready
        self._lock = threading.Lock()
        self._weights: OrderedDict[str, LoraWeights] = OrderedDict()
        self._failed: dict[str, AdapterError] = {}
        self._loading: set[str] = set()
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-load")

    def get(self, digest: str) -> LoraWeights | None:
        """The weights, or None while they are on their way (this call starts the load).

        Raises:
            AdapterError: what the load failed with; asking again tries again.
        """
        with self._lock:
            if error := self._failed.pop(digest, None):
                raise error
            if weights := self._weights.get(digest):
                self._weights.move_to_end(digest)
                return weights
            if digest not in self._loading:
                self._loading.add(digest)
                self._threads.submit(self._load, digest)
        return None

    def drop(self, digest: str) -> None:
        with self._lock:
            self._weights.pop(digest, None)

    def digests(self) -> list[str]:
        with self._lock:
            return list(self._weights)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _load(self, digest: str) -> None:
        start = time.monotonic()
        weights: LoraWeights | None = None
        error: AdapterError | None = None
        try:
            weights = self._source(digest)
        except AdapterError as reason:
            error = reason
            if isinstance(reason, AdapterFormatError):
                self._observer.adapter_verify_failed(reason.check)
        except Exception as reason:
            error = AdapterError(f"adapter {digest[:12]} could not be loaded: {type(reason).__name__}")
        with self._lock:
            self._loading.discard(digest)
            if weights is not None:
                self._weights[digest] = weights
                while len(self._weights) > self._capacity:
                    self._weights.popitem(last=False)
            elif error is not None:
                self._failed[digest] = error
        if weights is not None:
            self._observer.adapter_loaded("host", time.monotonic() - start)
        self._on_ready()


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
        self._rank = _RANK_STEP
        self._slot_of: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._references: dict[str, int] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._retired: set[str] = set()

    def acquire(self, digest: str) -> int | None:
        """Pin an adapter and return its slot; None while it is being fetched into host memory.

        Raises:
            NoFreeSlotError: every slot is pinned.
            AdapterError: the adapter cannot be loaded.
        """
        slot = self._slot_of.get(digest)
        if slot is None:
            weights = self._host.get(digest)
            if weights is None:
                return None
            slot = self._fill(digest, weights)
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

    def retire(self, digest: str) -> None:
        """Forget a deleted adapter: at once when idle, else when its last sequence ends."""
        self._host.drop(digest)
        if digest not in self._slot_of:
            return
        if digest in self._references:
            self._retired.add(digest)
        else:
            self._evict(digest, "deleted")

    def resident(self) -> list[str]:
        """Digests that hold a slot, least recently used first."""
        return list(self._slot_of)

    def references(self) -> dict[str, int]:
        """How many running sequences pin each adapter."""
        return dict(self._references)

    def close(self) -> None:
        """Give the memory of all slots back."""
        self.tables.clear()

    def _fill(self, digest: str, weights: LoraWeights) -> int:
        start = time.monotonic()
        if weights.max_rank > self.max_rank:
            raise AdapterFormatError(f"rank {weights.max_rank} is above {self.max_rank}", check="rank")
        if not self._free:
            victim = next((d for d in self._slot_of if d not in self._references), None)
            if victim is None:
                raise NoFreeSlotError(f"all {self.num_slots} adapter slots are in use")
            self._evict(victim, "capacity")
        self._fit_rank(weights.max_rank)
        slot = self._free.pop()
        for site in self._sites:
            if site not in self.tables and any(part.name in weights.modules for part in site.parts):
                self.tables[site] = self._new_table(site)
        for table in self.tables.values():
            table.load(slot, weights.modules)
        self._slot_of[digest] = slot
        self._observer.adapter_loaded("device", time.monotonic() - start)
        return slot

    def _evict(self, digest: str, reason: str) -> None:
        self._free.append(self._slot_of.pop(digest))
        self._retired.discard(digest)
        self._observer.adapter_evicted(reason)

    def _fit_rank(self, rank: int) -> None:
        """Tables are as wide as the widest adapter seen, not as the widest allowed: zeros cost time too."""
        if rank <= self._rank:
            return
        self._rank = -(-rank // _RANK_STEP) * _RANK_STEP
        for site, narrow in self.tables.items():
            self.tables[site] = self._new_table(site)
            self.tables[site].copy_from(narrow)

    def _new_table(self, site: BatchedLoraLinear) -> SlotTable:
        return SlotTable(site, self.num_slots, self._rank, self._dtype, self._device)
