"""What a running sequence holds: a row of the cache and a slot with its adapter. Knows no plan and no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from adapters.errors import NoFreeSlotError
from adapters.slots import AdapterSlots
from service.engine.kv_cache import KvCache, KvCacheFullError, Row
from service.engine.scheduler import Admission
from service.engine.sequence import Sequence


@dataclass
class Place:
    """Where one running sequence is. `slot` is None for the base.

    `hidden_sum` is [hidden], over the prompt tokens computed so far; only of a sequence that pools.
    """

    row: Row
    slot: int | None
    hidden_sum: torch.Tensor | None = None


class Residency:
    """Gives and takes places; the scheduler's `Resources`."""

    def __init__(self, cache: KvCache, slots: AdapterSlots) -> None:
        self.cache = cache
        self.slots = slots
        self._places: dict[Sequence, Place] = {}

    def __getitem__(self, sequence: Sequence) -> Place:
        return self._places[sequence]

    def acquire(self, sequence: Sequence) -> Admission:
        digest = sequence.request.adapter
        if not self.cache.has_room(sequence.num_tokens):  # a preempted one comes back when all of it fits
            return Admission.FULL
        try:
            row = self.cache.allocate(sequence.num_prompt_tokens)
        except KvCacheFullError:
            return Admission.FULL
        slot: int | None = None
        try:
            if digest is not None and (slot := self.slots.acquire(digest)) is None:
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
        if sequence.request.adapter is not None:
            self.slots.release(sequence.request.adapter)

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
