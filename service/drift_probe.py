"""Prompts measured by the base, behind everybody's requests and within a budget. Knows the engine's messages, not why.

While nobody else runs or waits, nor has for `QUIET_SECONDS`, probes are free. Otherwise they may cost `SHARE` of that
time: who asks again as soon as it is answered would find a probe in every gap between its requests. What one costs
beside others cannot be told from its own waiting, so it is charged what its chunks took when nobody else was there;
until that is known, all the time that it was under way.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, inf
from queue import Empty, SimpleQueue
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.engine.errors import EngineError
from service.engine.observation import EngineStats
from service.engine.sequence import GenerationRequest, OutputChunk

PROBE_PRIORITY = -100
ACCOUNT = "{tenant}/drift"
SHARE = 0.005
QUIET_SECONDS = 0.2
MAX_STEP_SECONDS = 0.5
TIMEOUT_SECONDS = 60.0
CHECK_SECONDS = 0.2


class Probing(Protocol):
    """The part of `ServingEngine` that is needed here."""

    @property
    def num_open(self) -> int: ...

    @property
    def last_ended_at(self) -> float | None: ...

    def submit(self, request: GenerationRequest, on_chunk: Callable[[OutputChunk], None]) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def stats(self) -> EngineStats: ...


@dataclass(frozen=True)
class Probed:
    """`embedding` [hidden] of length one; `nll` the prompt's mean token NLL in nats, where the engine tells it.

    `seconds` of computing, as far as that can be told; `is_free`: nobody else was there.
    """

    embedding: NDArray[np.float32]
    nll: float | None
    seconds: float
    is_free: bool


class ProbeBudget:
    """A share of the time in which others were there: each probe is a debt that such time pays off.

    Time without anybody pays nothing, or each burst of requests would find what was saved up before it.
    """

    def __init__(self, clock: Callable[[], float], share: float = SHARE) -> None:
        self._clock = clock
        self._share = share
        self._debt = 0.0
        self._at = clock()

    @property
    def debt_seconds(self) -> float:
        """Somebody is there, and a probe waits: asked every now and then, at most `MAX_STEP_SECONDS` count at once."""
        now = self._clock()
        self._debt = max(0.0, self._debt - min(MAX_STEP_SECONDS, now - self._at) * self._share)
        self._at = now
        return self._debt

    def idle(self) -> None:
        """Nobody was there until now."""
        self._at = self._clock()

    def charge(self, seconds: float) -> None:
        self._debt += seconds


class Prober:
    """One probe at a time, by one thread."""

    def __init__(
        self, engine: Probing, *, chunk_tokens: int, is_stopping: Callable[[], bool], clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._chunk_tokens = chunk_tokens
        self._is_stopping = is_stopping
        self._clock = clock
        self._budget = ProbeBudget(clock)
        self._chunk_seconds: float | None = None
        self._ended_at: float | None = None
        """When the latest probe did: steps until then may have been its own."""

    @property
    def may_start(self) -> bool:
        stats = self._engine.stats()
        if not stats.alive or stats.restarting:
            return False
        if self._is_quiet(stats):
            self._budget.idle()
            return True
        return not self._budget.debt_seconds

    def measure(self, tenant_id: str, prompt: tuple[int, ...]) -> Probed | None:
        """None when the engine did not measure it."""
        is_free = self._is_quiet(self._engine.stats())
        start = self._clock()
        request_id, account = f"drift-{uuid.uuid4().hex}", ACCOUNT.format(tenant=tenant_id)
        request = GenerationRequest.probe(request_id, prompt, account, priority=PROBE_PRIORITY)
        chunk = self._ask(replace(request, timeout_seconds=TIMEOUT_SECONDS))
        self._ended_at = self._clock()
        seconds = self._cost(len(prompt), self._ended_at - start, is_free)
        if not is_free:
            self._budget.charge(seconds)
        if chunk is None or chunk.embedding is None:
            return None
        return Probed(chunk.embedding, chunk.prompt_nll, seconds, is_free)

    def _is_quiet(self, stats: EngineStats) -> bool:
        if stats.num_running or stats.num_waiting or self._engine.num_open:
            return False
        known = [at for at in (stats.last_step_at, self._engine.last_ended_at) if at is not None]
        last = max(known, default=-inf)
        if self._ended_at is not None and last <= self._ended_at:
            return True
        return self._clock() - last >= QUIET_SECONDS

    def _ask(self, request: GenerationRequest) -> OutputChunk | None:
        chunks: SimpleQueue[OutputChunk] = SimpleQueue()
        deadline = time.monotonic() + 2 * TIMEOUT_SECONDS  # the engine's own comes first, unless it hangs
        try:
            self._engine.submit(request, chunks.put)
        except EngineError:  # its queue is full, or it stops
            return None
        while not self._is_stopping() and time.monotonic() < deadline:
            try:
                chunk = chunks.get(timeout=CHECK_SECONDS)
            except Empty:
                continue
            if chunk.finish_reason is not None:
                return chunk
        self._engine.abort(request.request_id)
        return None

    def _cost(self, num_tokens: int, wall_seconds: float, is_free: bool) -> float:
        num_chunks = ceil(num_tokens / self._chunk_tokens)
        if is_free:
            seconds, known = wall_seconds / num_chunks, self._chunk_seconds
            # Whoever comes meanwhile makes it slower: the quick ones tell the truth, and are forgotten slowly.
            self._chunk_seconds = seconds if known is None else min(seconds, known * 1.05)
            return wall_seconds
        return wall_seconds if self._chunk_seconds is None else min(wall_seconds, num_chunks * self._chunk_seconds)
