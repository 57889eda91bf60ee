"""Shadow copies are the first to go when anybody waits, and never in the way of a client."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping

from service.engine.errors import QueueFullError
from service.engine.sequence import FinishReason, GenerationRequest, SamplingParams
from service.experiment import Arm, Measure
from service.routing import ResolvedModel, ShadowTarget
from service.shadows import MAX_RUNNING, Answered, Shadows
from tests.fakes import FakeEngine

TARGET = ShadowTarget("exp-a", ResolvedModel("ft:shadow", "b" * 64), 100.0)


class Heard:
    """In the place of the traffic log."""

    def __init__(self) -> None:
        self.values: list[Mapping[tuple[Arm, Measure], float]] = []
        self.ended: Counter[str] = Counter()

    def observed(self, tenant_id: str, experiment_id: str, values: Mapping[tuple[Arm, Measure], float]) -> None:
        assert (tenant_id, experiment_id) == ("acme", "exp-a")
        self.values.append(values)

    def on_ended(self, outcome: str) -> None:
        self.ended[outcome] += 1


def scene(**engine: object) -> tuple[FakeEngine, Heard, Shadows]:
    fake, heard = FakeEngine(**{"num_waiting": 0, **engine}), Heard()  # type: ignore[arg-type]
    return fake, heard, Shadows(fake, heard, heard.on_ended)  # type: ignore[arg-type]


def original(**sampling: object) -> GenerationRequest:
    params = SamplingParams(**{"max_tokens": 50, "temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return GenerationRequest("chatcmpl-1-0", (1, 2), params, "acme", "a" * 64)


async def settle(shadows: Shadows, num_running: int = 0) -> None:
    async with asyncio.timeout(10):
        while shadows.num_running != num_running:
            await asyncio.sleep(0.001)


def test_a_copy_that_runs_is_dropped_as_soon_as_somebody_waits() -> None:
    async def run() -> None:
        engine, heard, shadows = scene(endless=True)
        shadows.offer(TARGET, original(), Answered())
        await asyncio.sleep(0.01)
        assert shadows.num_running == 1 and not heard.ended
        engine.num_waiting = 1
        await settle(shadows)
        assert heard.ended == {"dropped": 1} and len(engine.aborted) == 1
        assert heard.values == [{(Arm.SHADOW, Measure.DROPPED): 1.0}]

    asyncio.run(run())


def test_nothing_starts_while_somebody_waits_or_enough_copies_run() -> None:
    async def run() -> None:
        engine, heard, shadows = scene(num_waiting=1)
        shadows.offer(TARGET, original(), Answered())
        assert engine.requests == [] and heard.ended == {"dropped": 1}
        engine.num_waiting, engine.first_step_blocked = 0, True
        for _ in range(MAX_RUNNING + 3):
            shadows.offer(TARGET, original(), Answered())  # at once, though no copy gets anywhere
        assert shadows.num_running == MAX_RUNNING and heard.ended == {"dropped": 4}
        engine.first_step_blocked = False
        await settle(shadows)
        assert heard.ended == {"dropped": 4, "compared": MAX_RUNNING}

    asyncio.run(run())


def test_a_refused_copy_is_dropped_and_a_failing_shadow_is_counted() -> None:
    async def run() -> None:
        engine, heard, shadows = scene(refusal=QueueFullError("full", retry_after=1.0))
        shadows.offer(TARGET, original(), Answered())
        await settle(shadows)
        engine.refusal, engine.failing_adapters = None, {"b" * 64}
        shadows.offer(TARGET, original(), Answered())
        await settle(shadows)
        assert heard.ended == {"dropped": 1, "failed": 1}
        assert heard.values[-1] == {(Arm.SHADOW, Measure.ERROR): 1.0, (Arm.SHADOW, Measure.DROPPED): 0.0}

    asyncio.run(run())


def test_only_answers_that_should_be_the_same_are_compared_word_by_word() -> None:
    async def run() -> None:
        _, heard, shadows = scene()
        stable = Answered(tokens=[1, 2, 9], finish_reason=FinishReason.LENGTH, seconds=2.0)
        for sampling, compared in (({"temperature": 0.0}, 1), ({"temperature": 1.0}, 0), ({"seed": 3}, 1)):
            shadows.offer(TARGET, original(**sampling), stable)
            await settle(shadows)
            values = heard.values[-1]
            assert ((Arm.SHADOW, Measure.AGREED) in values) == compared
            assert values.get((Arm.SHADOW, Measure.AGREED), 0.0) == 0.0, "they differ"
            assert values[Arm.SHADOW, Measure.TOKENS_DIFFERENCE] == 2.0
            assert values[Arm.STABLE, Measure.LENGTH] == 1.0 and (Arm.STABLE, Measure.NLL) not in values

    asyncio.run(run())
