"""Copies of requests, answered by a shadow model behind everybody else, compared and forgotten. Keeps no text.

A copy starts when its original is answered, so it never delays it. It is dropped when anybody waits: before it
starts, and while it runs. Knows the engine's messages; not HTTP, not the database.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from service.engine.errors import EngineError
from service.engine.observation import EngineStats
from service.engine.sequence import FinishReason, GenerationRequest, OutputChunk
from service.experiment import Arm, Measure
from service.routing import ShadowTarget
from service.traffic_log import TrafficLog
from service.traffic_split import place_of

SHADOW_PRIORITY = -100
MAX_RUNNING = 2
TIMEOUT_SECONDS = 60.0


class Answering(Protocol):
    """The part of `Engine` that is needed here."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[OutputChunk, None]: ...

    def stats(self) -> EngineStats: ...


@dataclass
class Answered:
    """One model's answer, as far as it is compared."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    seconds: float = 0.0

    def add(self, chunk: OutputChunk) -> None:
        self.tokens.extend(chunk.token_ids)
        self.logprobs.extend(token.logprob for token in chunk.logprobs or ())
        self.finish_reason = chunk.finish_reason

    def measures(self, arm: Arm) -> dict[tuple[Arm, Measure], float]:
        found = {
            (arm, Measure.SECONDS): self.seconds,
            (arm, Measure.TOKENS): float(len(self.tokens)),
            (arm, Measure.LENGTH): float(self.finish_reason is FinishReason.LENGTH),
        }
        if self.logprobs:
            found[arm, Measure.NLL] = -sum(self.logprobs) / len(self.logprobs)
        return found


class Shadows:
    """Lives on one event loop."""

    def __init__(self, engine: Answering, traffic: TrafficLog, on_ended: Callable[[str], None]) -> None:
        self._engine = engine
        self._traffic = traffic
        self._on_ended = on_ended
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    @staticmethod
    def wants(target: ShadowTarget, completion_id: str) -> bool:
        return place_of(target.experiment_id, completion_id).within(target.percent)

    def offer(self, target: ShadowTarget, original: GenerationRequest, answered: Answered) -> None:
        """Let the shadow answer a copy of `original`, if nobody has to wait for that. Returns at once."""
        if self._is_busy() or len(self._tasks) >= MAX_RUNNING:
            self._drop(target, original.tenant)
            return
        task = asyncio.get_running_loop().create_task(self._compare(target, original, answered))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(self, target: ShadowTarget, original: GenerationRequest, stable: Answered) -> None:
        shadow = Answered()
        start = time.perf_counter()
        try:
            async with aclosing(self._engine.generate(_copy(original, target))) as chunks:
                async for chunk in chunks:
                    shadow.add(chunk)
                    if chunk.finish_reason is None and self._is_busy():
                        self._drop(target, original.tenant)
                        return
        except EngineError:  # the queue is full, or the engine stops
            self._drop(target, original.tenant)
            return
        shadow.seconds = time.perf_counter() - start
        if shadow.finish_reason in (FinishReason.TIMEOUT, FinishReason.ABORT):
            self._drop(target, original.tenant)
            return
        failed = shadow.finish_reason is FinishReason.ERROR
        values = {(Arm.SHADOW, Measure.ERROR): float(failed), (Arm.SHADOW, Measure.DROPPED): 0.0}
        if not failed:
            values |= stable.measures(Arm.STABLE) | shadow.measures(Arm.SHADOW) | _differences(stable, shadow)
            if _is_comparable(original):
                values[Arm.SHADOW, Measure.AGREED] = float(stable.tokens == shadow.tokens)
        self._traffic.observed(original.tenant, target.experiment_id, values)
        self._on_ended("failed" if failed else "compared")

    def _drop(self, target: ShadowTarget, tenant_id: str) -> None:
        self._traffic.observed(tenant_id, target.experiment_id, {(Arm.SHADOW, Measure.DROPPED): 1.0})
        self._on_ended("dropped")

    def _is_busy(self) -> bool:
        """Whether anybody waits. A copy of our own may be among them: then it is one too many all the same."""
        return self._engine.stats().num_waiting > 0


def _copy(original: GenerationRequest, target: ShadowTarget) -> GenerationRequest:
    """For an account of its own, so that the tenant's own requests are served as if it were not there."""
    return replace(
        original,
        request_id=f"shadow-{uuid.uuid4().hex}",
        tenant=f"{original.tenant}/shadow",
        adapter=target.model.digest,
        priority=SHADOW_PRIORITY,
        timeout_seconds=TIMEOUT_SECONDS,
        sampling=replace(original.sampling, logprobs=original.sampling.logprobs or 0),
    )


def _is_comparable(original: GenerationRequest) -> bool:
    """Two answers that are drawn freely differ whatever the model."""
    return original.sampling.temperature == 0 or original.sampling.seed is not None


def _differences(stable: Answered, shadow: Answered) -> dict[tuple[Arm, Measure], float]:
    return {
        (Arm.SHADOW, Measure.SECONDS_DIFFERENCE): shadow.seconds - stable.seconds,
        (Arm.SHADOW, Measure.TOKENS_DIFFERENCE): float(len(shadow.tokens) - len(stable.tokens)),
    }
