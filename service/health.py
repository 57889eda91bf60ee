"""Is the engine alive, is the service ready: the answers behind /livez and /readyz. Knows no HTTP.

An engine that has nothing to do makes no steps, so an idle one is asked for one token from time to time; that
is how "a forward succeeded lately" can be promised at any hour.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

import structlog

from service.engine.sequence import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from service.engine.serving_engine import ServingEngine

log = structlog.get_logger("service.health")

SELF_CHECK_TENANT = "_self_check"


class Health:
    """What is wrong, in words; None when nothing is. Before `watch` the base is still loading."""

    def __init__(self, stall_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_seconds = stall_seconds
        self._clock = clock
        self._engine: ServingEngine | None = None
        self._draining = False

    def watch(self, engine: ServingEngine) -> None:
        """The base is loaded and the engine has started."""
        self._engine = engine

    def drain(self) -> None:
        """The service is going: nobody should send new requests."""
        self._draining = True

    def trouble(self) -> str | None:
        """Why the process should be restarted. Proves progress of the engine, not of the HTTP loop."""
        if self._engine is None:
            return None
        stats = self._engine.stats()
        if not stats.alive and not self._draining:
            return stats.error or "the engine has stopped"
        if stats.busy_since is None:
            return None
        quiet_seconds = self._clock() - max(stats.busy_since, stats.last_step_at or 0.0)
        if quiet_seconds > self._stall_seconds:
            return f"there is work, but no step for {quiet_seconds:.0f} s"
        return None

    def not_ready(self) -> str | None:
        """Why no new requests should come here."""
        if self._draining:
            return "draining"
        if self._engine is None:
            return "the base is loading"
        if self._engine.stats().restarting:
            return self.trouble() or "the engine is restarting after a failure"
        if not self._stepped_within(self._stall_seconds):
            return self.trouble() or f"no successful forward in the last {self._stall_seconds:.0f} s"
        return self.trouble()

    async def keep_checking(self) -> None:
        """Ask an idle engine for one token, twice within the time that counts as recent; until cancelled."""
        while True:
            if self._engine is not None and not self._stepped_within(self._stall_seconds / 2):
                await self._self_check(self._engine)
            await asyncio.sleep(self._stall_seconds / 4)

    async def _self_check(self, engine: ServingEngine) -> None:
        request = GenerationRequest(
            request_id=f"selfcheck-{uuid.uuid4().hex}",
            prompt_token_ids=(min(engine.base.eos_token_ids, default=0),),
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
            tenant=SELF_CHECK_TENANT,
        )
        try:
            async with asyncio.timeout(self._stall_seconds), aclosing(engine.generate(request)) as chunks:
                async for _ in chunks:
                    pass
        except Exception as error:  # whatever it is, the next check must come
            log.warning("self_check_failed", reason=type(error).__name__)

    def _stepped_within(self, seconds: float) -> bool:
        assert self._engine is not None
        last_step_at = self._engine.stats().last_step_at
        return last_step_at is not None and self._clock() - last_step_at <= seconds
