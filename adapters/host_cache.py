"""Adapters in host memory, ready for a slot: loaded by threads of its own, least recently used out first.

Each digest is loaded by one thread at a time, and a load that fails is told to whoever asks for that adapter next.
Knows the store only as a function, and no slot.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from adapters.errors import AdapterError, AdapterFormatError
from adapters.prepared import PreparedAdapter
from adapters.slot_observer import SlotObserver
from adapters.thread_priority import lower_priority

NUM_LOADERS = 4
"""A store on the network answers slowly and many at once."""

FAILURE_SECONDS = 10.0
"""A failure is told for so long; after that whoever asks tries again."""

_NICENESS = 5
"""Behind decoding, before training."""


class HostCache:
    """Bounded by a number of adapters and by bytes; one adapter larger than that is kept alone.

    `load` makes an adapter from its digest and runs in a loading thread; `on_ready` is called there after each.
    """

    def __init__(
        self,
        load: Callable[[str], PreparedAdapter],
        *,
        capacity: int,
        max_bytes: int,
        observer: SlotObserver,
        on_ready: Callable[[], None],
    ) -> None:
        self.capacity = capacity
        self._load_adapter = load
        self._max_bytes = max_bytes
        self._observer = observer
        self._on_ready = on_ready
        self._lock = threading.Lock()
        self._adapters: OrderedDict[str, PreparedAdapter] = OrderedDict()  # least recently used first
        self._num_bytes = 0
        self._failed: OrderedDict[str, tuple[float, AdapterError]] = OrderedDict()
        self._loading: set[str] = set()
        self._near: frozenset[str] = frozenset()  # what the last `prefetch` found room for
        self._digests: tuple[str, ...] | None = None
        self._threads = ThreadPoolExecutor(NUM_LOADERS, thread_name_prefix="adapter-load", initializer=_stand_back)

    def get(self, digest: str) -> PreparedAdapter | None:
        """The adapter, or None while it is on its way or others are wanted sooner.

        This call starts the load, unless the last `prefetch` found no room for it: loading everything that anybody
        waits for would push out what is needed next, again and again.

        Raises:
            AdapterError: what the load failed with; asking again tries again.
        """
        with self._lock:
            failed_at, error = self._failed.pop(digest, (0.0, None))
            if error is not None and time.monotonic() - failed_at < FAILURE_SECONDS:
                raise error
            if adapter := self._adapters.get(digest):
                self._adapters.move_to_end(digest)
                return adapter
            if not self._near or digest in self._near:
                self._start(digest)
        return None

    def prefetch(self, digests: Sequence[str]) -> list[str]:
        """Bring the soonest wanted (first) here as far as there is room for all of them; which are here already.

        What is wanted soonest goes out last.
        """
        with self._lock:
            near = self._that_fit(digests)
            self._near = frozenset(near)
            for digest in reversed(near):
                if digest in self._adapters:
                    self._adapters.move_to_end(digest)
            for digest in near:
                if digest not in self._adapters and digest not in self._failed:
                    self._start(digest)
            return [digest for digest in near if digest in self._adapters]

    def drop(self, digest: str) -> None:
        with self._lock:
            self._failed.pop(digest, None)
            if digest in self._adapters:
                self._remove(digest)

    def digests(self) -> tuple[str, ...]:
        """What is here; made anew only after a change."""
        with self._lock:
            if self._digests is None:
                self._digests = tuple(self._adapters)
            return self._digests

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _that_fit(self, digests: Sequence[str]) -> list[str]:
        """The first of `digests` that fit together; one not seen yet counts as large as the average."""
        average = self._num_bytes // len(self._adapters) if self._adapters else 0
        fitting: list[str] = []
        num_bytes = 0
        for digest in digests[: self.capacity]:
            known = self._adapters.get(digest)
            num_bytes += known.num_bytes if known else average
            if fitting and num_bytes > self._max_bytes:
                break
            fitting.append(digest)
        return fitting

    def _start(self, digest: str) -> None:
        if digest not in self._loading:
            self._loading.add(digest)
            self._threads.submit(self._load, digest)

    def _load(self, digest: str) -> None:
        start = time.monotonic()
        result: PreparedAdapter | AdapterError
        try:
            result = self._load_adapter(digest)
        except AdapterError as reason:
            result = reason
        except Exception as reason:
            result = AdapterError(f"adapter {digest[:12]} could not be loaded: {type(reason).__name__}")
        if not isinstance(result, AdapterError):
            self._observer.adapter_loaded("host", time.monotonic() - start)
        elif isinstance(result, AdapterFormatError):
            self._observer.adapter_verify_failed(result.check)
        with self._lock:
            self._loading.discard(digest)
            if isinstance(result, AdapterError):
                self._remember_failure(digest, result)
            else:
                self._insert(digest, result)
        self._on_ready()

    def _remember_failure(self, digest: str, error: AdapterError) -> None:
        """Until it is asked for; whoever wanted it may have gone."""
        self._failed[digest] = (time.monotonic(), error)
        while len(self._failed) > self.capacity:
            self._failed.popitem(last=False)

    def _insert(self, digest: str, adapter: PreparedAdapter) -> None:
        self._failed.pop(digest, None)
        self._adapters[digest] = adapter
        self._num_bytes += adapter.num_bytes
        self._digests = None
        while len(self._adapters) > 1 and self._is_over_full():
            self._remove(next(iter(self._adapters)))

    def _is_over_full(self) -> bool:
        return len(self._adapters) > self.capacity or self._num_bytes > self._max_bytes

    def _remove(self, digest: str) -> None:
        self._num_bytes -= self._adapters.pop(digest).num_bytes
        self._digests = None


def _stand_back() -> None:
    """Decoding goes first. Refused where the whole process stands further back already, which is as good."""
    with suppress(OSError):
        lower_priority(_NICENESS)
