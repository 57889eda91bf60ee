"""Which tenants get a metric label of their own when there are more tenants than labels. Knows no metric."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OTHER = "_other"


class TenantLabels:
    """At most `capacity` tenants are named; the others share `_other`.

    The first come are named first. A tenant of `_other` that has been seen twice as often as the least seen
    named one takes its place: the busiest end up named, and no series ever counts backwards.
    """

    def __init__(self, capacity: int, *, on_removed: Callable[[str], None], on_overflow: Callable[[], None]) -> None:
        self._capacity = capacity
        self._on_removed = on_removed
        self._on_overflow = on_overflow
        self._lock = threading.Lock()
        self._named: Counter[str] = Counter()
        self._others: Counter[str] = Counter()
        self._forgotten: set[str] = set()

    @contextmanager
    def label(self, tenant_id: str, *, counts: bool = True) -> Iterator[str]:
        """The label to count one event of this tenant under; it is not removed before the block ends. An event that
        does not count makes nobody busier."""
        with self._lock:
            yield self._choose(tenant_id) if counts else tenant_id if tenant_id in self._named else OTHER

    def names(self, tenant_id: str) -> bool:
        """Whether the tenant has a label of its own now."""
        with self._lock:
            return tenant_id in self._named

    def shown(self, tenant_id: str) -> str:
        """The label of a gauge, which counts nothing: the tenant's own if it has one or there is room."""
        with self._lock:
            if tenant_id in self._forgotten:
                return OTHER
            if tenant_id not in self._named and len(self._named) < self._capacity:
                self._named[tenant_id] = 0
            return tenant_id if tenant_id in self._named else OTHER

    def forget(self, tenant_id: str) -> None:
        """The tenant is gone: its label is free, and it never gets one again."""
        with self._lock:
            self._forgotten.add(tenant_id)
            self._others.pop(tenant_id, None)
            if self._named.pop(tenant_id, None) is not None:
                self._on_removed(tenant_id)

    def _choose(self, tenant_id: str) -> str:
        if tenant_id in self._forgotten:  # a request that outlived its tenant opens no new series
            return OTHER
        if tenant_id in self._named or len(self._named) < self._capacity or self._overtakes(tenant_id):
            self._named[tenant_id] += 1
            return tenant_id
        self._others[tenant_id] += 1
        self._on_overflow()
        return OTHER

    def _overtakes(self, tenant_id: str) -> bool:
        least, times_seen = min(self._named.items(), key=lambda item: item[1])
        if self._others[tenant_id] <= 2 * times_seen:
            return False
        self._others[least] = self._named.pop(least)
        self._named[tenant_id] = self._others.pop(tenant_id)
        self._on_removed(least)
        return True
