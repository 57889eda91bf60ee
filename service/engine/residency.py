"""What a running sequence holds: a row of the cache and a slot with its adapter. Knows no plan and no model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from adapters.errors import NoFreeSlotError
from adapters.slots import AdapterSlots
from service.engine.kv_cache import KvCache, KvCacheFullError, Row
from service.engine.prefix_cache import PrefixCache
from service.engine.scheduler import Admission
from service.engine.sequence import Sequence

_TOKENS_AHEAD = 8
"""Room for the answer's first tokens: a prompt that just fits a row would move at once."""


@dataclass
class Place:
    """Where one running sequence is. `slot` is None for the base.

    `hidden_sum` is [hidden], over the prompt tokens computed so far; only of a sequence that pools. `nll_sum` is the
    sum of -log p of those behind the first; only of a probe.
    """

    row: Row
    slot: int | None
    hidden_sum: torch.Tensor | None = None
    nll_sum: torch.Tensor | None = None


class Residency:
    """Gives and takes places; the scheduler's `Resources`."""

    def __init__(self, cache: KvCache, slots: AdapterSlots, prefixes: PrefixCache | None = None) -> None:
        self.cache = cache
        self.slots = slots
        self.prefixes = prefixes
        self._places: dict[Sequence, Place] = {}

    def __getitem__(self, sequence: Sequence) -> Place:
        return self._places[sequence]

    def acquire(self, sequence: Sequence) -> Admission:
        digest = sequence.request.adapter
        if not self.cache.has_room(sequence.num_tokens):  # a preempted one comes back when all of it fits
            return Admission.FULL
        try:
            row = self.cache.allocate(min(sequence.num_prompt_tokens + _TOKENS_AHEAD, self.cache.slab_tokens))
        except KvCacheFullError:
            return Admission.FULL
        slot: int | None = None
        try:
            if digest is not None and (slot := self._slot(sequence, digest)) is None:
                self.cache.free(row)
                return Admission.LATER
        except NoFreeSlotError:
            self.cache.free(row)
            return Admission.NO_SLOT
        except Exception:
            self.cache.free(row)
            raise
        self._places[sequence] = Place(row, slot)
        return Admission.STARTED

    def _slot(self, sequence: Sequence, digest: str) -> int | None:
        times = sequence.times
        if times.adapter_wanted is None:
            times.adapter_wanted = time.monotonic()
        slot = self.slots.acquire(digest)
        if slot is not None and times.adapter_ready is None:
            times.adapter_ready = time.monotonic()
        return slot

    def match(self, sequence: Sequence) -> int | None:
        return 0 if self.prefixes is None else self.prefixes.match(sequence)

    def fetch(self, sequence: Sequence, num_tokens: int) -> None:
        if self.prefixes is not None:
            self.prefixes.fetch(sequence, self._places[sequence].row, num_tokens)

    def keep(self, sequence: Sequence) -> None:
        """Let others start from what the sequence has just computed of its prompt."""
        if self.prefixes is not None:
            self.prefixes.keep(sequence, self._places[sequence].row)

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        place = self._places[sequence]
        try:
            place.row = self.cache.grow(place.row, num_tokens, sequence.num_computed)
        except KvCacheFullError:
            return False
        return True

    def release(self, sequence: Sequence) -> None:
        place = self._places.pop(sequence)
        self.cache.free(place.row)
        if self.prefixes is not None:
            self.prefixes.leave(sequence)
        if sequence.request.adapter is not None:
            self.slots.release(sequence.request.adapter)

    def retire(self, digest: str) -> None:
        """Forget a deleted adapter and what was computed with it."""
        self.slots.retire(digest)
        if self.prefixes is not None:
            self.prefixes.drop(digest)

    def close(self) -> None:
        """Give the memory back, whoever still refers to this. Nothing can be computed with it any more."""
        self._places.clear()
        self.cache.close()
        self.slots.close()

    def keep_for(self, sequences: Iterable[Sequence]) -> None:
        adapters = (sequence.request.adapter for sequence in sequences)
        self.slots.keep_for([adapter for adapter in dict.fromkeys(adapters) if adapter is not None])

    def check_integrity(self, holding: list[Sequence]) -> None:
        """Only running and paused sequences hold a place; a leak is our own bug."""
        assert set(self._places) == set(holding), "places and running sequences differ"
        if not holding:
            assert self.cache.usage == 0, "cache rows leaked"
            assert not self.slots.references(), "adapter references leaked"
        if self.prefixes is not None:
            self.prefixes.check_integrity(is_idle=not holding)
