"""Who waits, and in which order tenants take their turns. Knows no seat, no cache and no adapter slot.

Fairness between tenants is the virtual token counter of S-LoRA's sequel (arXiv 2401.00588): the tenant that has
been served least goes first, and a tenant that returns from idling is lifted to the least of the active ones.
Tenants do not trust each other, so a priority above 0 orders a tenant's own requests only; one below 0 puts a request
behind everybody's, which harms nobody else.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort_left, insort_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from service.engine.sequence import Sequence, SequenceStatus


class TokenCounters:
    """Weighted tokens each tenant has been served."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}

    def arrive(self, tenant: str, active: set[str]) -> None:
        """Lift a tenant that had nothing to do: idling earns no credit."""
        floor = min((self._served.get(t, 0.0) for t in active), default=0.0)
        self._served[tenant] = max(self._served.get(tenant, 0.0), floor)

    def charge(self, tenant: str, weight: float) -> None:
        self._served[tenant] = self._served.get(tenant, 0.0) + weight

    def served(self, tenant: str) -> float:
        return self._served.get(tenant, 0.0)

    def forget(self, tenant: str) -> None:
        self._served.pop(tenant, None)

    def forget_idle(self, active: set[str]) -> None:
        """Keep the table as small as the set of active tenants, plus the highest mark for those who return."""
        self._served = {t: v for t, v in self._served.items() if t in active}


class WaitingQueue:
    """A queue for each tenant: its own priorities first, then first come. Paused and preempted sequences stand in it.

    `num_waiting_of` and `adapters` are single reads, safe from other threads.
    """

    def __init__(self) -> None:
        self._of: dict[str, list[Sequence]] = {}
        self._num = 0
        self._wanting: Counter[str] = Counter()
        self._adapters: tuple[str, ...] | None = ()
        self.version = 0
        """Goes up with every change."""

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._of.values():
            yield from queue

    @property
    def tenants(self) -> set[str]:
        return set(self._of)

    def num_waiting_of(self, tenant: str) -> int:
        return len(self._of.get(tenant, ()))

    def adapters(self) -> tuple[str, ...]:
        """What waiting sequences want; made anew only after it changed."""
        if self._adapters is None:
            self._adapters = tuple(self._wanting)
        return self._adapters

    def add(self, sequence: Sequence, *, again: bool = False) -> None:
        """`again`: it has run before and goes before its equals."""
        queue = self._of.setdefault(sequence.request.tenant, [])
        (insort_left if again else insort_right)(queue, sequence, key=_own_order)
        self._num += 1
        self.version += 1
        if adapter := sequence.request.adapter:
            self._wanting[adapter] += 1
            self._adapters = None

    def remove(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        queue = self._of[tenant]
        del queue[queue.index(sequence, bisect_left(queue, _own_order(sequence), key=_own_order))]
        if not queue:
            del self._of[tenant]
        self._num -= 1
        self.version += 1
        if adapter := sequence.request.adapter:
            self._wanting[adapter] -= 1
            if not self._wanting[adapter]:
                del self._wanting[adapter]
            self._adapters = None

    def in_order(
        self,
        tenants: Iterable[str],
        served: Callable[[str], tuple[float, int]],
        share: int,
        *,
        ahead: bool = False,
    ) -> Iterator[Sequence]:
        """The sequences of `tenants`, the least served tenant's first, ranked no further than they are read.

        A tenant whose sequence was started meanwhile counts as served by up to `share` tokens more; with `ahead`, which
        only looks, every one counts as started. The queue may lose sequences while this is read.
        """
        queues = {tenant: iter(tuple(self._of[tenant])) for tenant in tenants}
        heap = [_entry(next(queue), *served(tenant)) for tenant, queue in queues.items()]
        heapq.heapify(heap)
        while heap:
            _, tokens, seats, _, tenant, sequence = heap[0]
            yield sequence
            if ahead or sequence.status is SequenceStatus.RUNNING:
                tokens, seats = tokens + min(share, sequence.num_prompt_tokens), seats + 1
            following = next(queues[tenant], None)
            if following is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, _entry(following, tokens, seats))


def background(sequence: Sequence) -> int:
    """How far it stands behind everybody's requests; 0 for almost all."""
    return max(0, -sequence.request.priority)


def _own_order(sequence: Sequence) -> tuple[int, float]:
    return (-sequence.request.priority, sequence.arrival)


def _entry(sequence: Sequence, tokens: float, seats: int) -> tuple[int, float, int, float, str, Sequence]:
    """One per tenant, so no two compare further than the tenant's name."""
    return (background(sequence), tokens, seats, sequence.arrival, sequence.request.tenant, sequence)
