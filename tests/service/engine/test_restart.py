"""Faults: in an answer, in a step, in the loop. Who is told what, what goes on, and what the probes say meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from adapters.lora_weights import LoraWeights
from service.engine import engine as engine_module
from service.engine.base_model import BaseModel
from service.engine.crash_limit import CrashLimit
from service.engine.engine import MAX_CRASHES
from service.engine.errors import EngineDeadError
from service.engine.plan import Plan
from service.engine.response import Response
from service.engine.runner import Runner
from service.engine.sequence import AskedBy, FinishReason, OutputChunk, SequenceReport
from service.health import Health
from tests.service.engine.conftest import Rig

pytestmark = pytest.mark.anyio

PROMPT = [5, 6, 7, 8]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Faults:
    """What goes wrong in every forward of every runner, also of those that a restart makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before: Callable[[Runner, Plan], object] = lambda runner, plan: None
        real = Runner.run

        def run(runner: Runner, plan: Plan, *args: object) -> object:
            self.before(runner, plan)
            return real(runner, plan, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(Runner, "run", run)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    yield Faults(monkeypatch)


def fail(*args: object) -> None:
    raise RuntimeError("boom")


class Gate:
    """Holds forwards until it is opened. `reached` says that one stands there."""

    def __init__(self, faults: Faults, but: Runner | None = None) -> None:
        self._open, self._reached, self._but = threading.Event(), threading.Event(), but
        faults.before = self._pass

    def _pass(self, runner: Runner, plan: Plan) -> None:
        if runner is not self._but:
            self._reached.set()
            self._open.wait(20)

    def reached(self) -> bool:
        return self._reached.is_set()

    def open(self) -> None:
        self._open.set()


def corrupt(rig: Rig) -> None:
    """The cache forgets its slabs: the next row that is given back, or grows, cannot be found."""
    rig.engine._machinery.residency.cache._slabs.clear()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.001)


async def started(rig: Rig, prompt: list[int], **sampling: Any) -> tuple[OutputChunk, asyncio.Task[list[OutputChunk]]]:
    """A stream that has begun, and the task that reads the rest of it."""
    stream = rig.engine.generate(rig.request(prompt, **sampling))
    first = await anext(stream)

    async def rest() -> list[OutputChunk]:
        return [chunk async for chunk in stream]

    return first, asyncio.create_task(rest())


def watched(rig: Rig, clock: Callable[[], float] = time.monotonic) -> Health:
    health = Health(60, clock)
    health.watch(rig.engine)
    return health


async def test_a_poisonous_request_ends_alone_however_often_it_comes_back(rig: Rig, faults: Faults) -> None:
    expected = await rig.tokens(PROMPT)
    poison = [9, 9, 9]

    def choke(runner: Runner, plan: Plan) -> None:
        if any(work.sequence.request.prompt_token_ids == tuple(poison) for work in plan.work):
            fail()

    faults.before = choke
    for _ in range(3 * MAX_CRASHES):
        [last] = await rig.ask(poison)
        assert last.finish_reason is FinishReason.ERROR and "boom" not in (last.error or "")
    assert await rig.tokens(PROMPT) == expected
    stats = rig.engine.stats()
    assert stats.alive and stats.num_restarts == 0 and watched(rig).not_ready() is None


async def test_a_crash_answers_who_had_started_and_the_engine_comes_back(rig: Rig) -> None:
    expected = {adapter: await rig.tokens(PROMPT, adapter) for adapter in (None, "wide")}
    streams = [await started(rig, PROMPT, max_tokens=400) for _ in range(3)]
    before = rig.engine.base.parameter_hash()
    corrupt(rig)
    for _, rest in streams:
        last = (await rest)[-1]
        assert last.finish_reason is FinishReason.ERROR and "restarting" in (last.error or "")
    assert {adapter: await rig.tokens(PROMPT, adapter) for adapter in expected} == expected
    stats = rig.engine.stats()
    assert (stats.num_restarts, stats.restarting, stats.alive) == (1, False, True)
    assert rig.engine.base.parameter_hash() == before
    failed = [r for r in rig.ear.reports if r.finish_reason is FinishReason.ERROR]
    assert len(failed) == 3, "each failed sequence is reported once"


async def test_requests_that_had_not_started_survive_one_crash(base: BaseModel) -> None:
    rig = Rig(base, max_num_seqs=1)
    expected = await rig.tokens(PROMPT)
    _, running = await started(rig, [9], max_tokens=400)
    waiting = [asyncio.create_task(rig.tokens(PROMPT)) for _ in range(3)]
    await until(lambda: rig.engine.stats().num_waiting == 3)
    corrupt(rig)
    assert (await running)[-1].finish_reason is FinishReason.ERROR
    assert await asyncio.gather(*waiting) == [expected] * 3
    rig.engine.shutdown(0)
    assert rig.engine.stats().num_restarts == 1


async def test_readiness_returns_only_after_a_forward_that_succeeds(rig: Rig, faults: Faults) -> None:
    health = watched(rig)
    await rig.tokens(PROMPT)
    assert health.not_ready() is None
    gate = Gate(faults, but=rig.engine._machinery.runner)
    _, stream = await started(rig, PROMPT, max_tokens=400)
    corrupt(rig)
    await stream
    await until(gate.reached)
    assert health.not_ready() == "the engine is restarting after a failure" and health.trouble() is None
    late = asyncio.create_task(rig.tokens(PROMPT))
    gate.open()
    assert len(await late) == 16, "what comes during a restart is answered after it"
    assert health.not_ready() is None


async def test_a_restart_that_hangs_is_a_stalled_engine(rig: Rig, faults: Faults) -> None:
    now = time.monotonic()
    health = watched(rig, lambda: now)
    gate = Gate(faults, but=rig.engine._machinery.runner)
    _, stream = await started(rig, PROMPT, max_tokens=400)
    corrupt(rig)
    await stream
    await until(gate.reached)
    now = time.monotonic() + 61
    assert "no step for" in (health.trouble() or "")
    gate.open()
    await rig.tokens(PROMPT)
    assert health.trouble() is None


async def test_a_crash_loop_ends_the_engine_for_good(rig: Rig, faults: Faults) -> None:
    health = watched(rig)
    await rig.tokens(PROMPT)
    faults.before = fail
    [last] = await rig.ask(PROMPT)
    assert last.finish_reason is FinishReason.ERROR
    await until(lambda: not rig.engine.stats().alive)
    assert rig.engine.stats().num_restarts == 0, "it never came back"
    assert health.trouble() == health.not_ready() == "the engine stopped: RuntimeError"
    with pytest.raises(EngineDeadError):
        await rig.tokens(PROMPT)


async def test_a_lost_device_is_not_restarted_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "is_lost", lambda device: True)
    _, stream = await started(rig, PROMPT, max_tokens=400)
    corrupt(rig)
    assert (await stream)[-1].finish_reason is FinishReason.ERROR
    await until(lambda: not rig.engine.stats().alive)
    assert "stopped" in (watched(rig).trouble() or "")


async def test_a_step_that_hangs_is_neither_alive_nor_ready(rig: Rig, faults: Faults) -> None:
    now = time.monotonic()
    health = watched(rig, lambda: now)
    await rig.tokens(PROMPT)
    gate = Gate(faults)
    answer = asyncio.create_task(rig.tokens(PROMPT))
    await until(gate.reached)
    assert health.trouble() is None and health.not_ready() is None, "a slow step is no fault yet"
    now = time.monotonic() + 61
    assert "no step for" in (health.trouble() or "") and "no step for" in (health.not_ready() or "")
    gate.open()
    assert len(await answer) == 16


async def test_waiting_for_an_adapter_that_does_not_arrive_is_no_stall(rig: Rig) -> None:
    """The store hangs, not the engine: a restart of the process would help nobody."""
    now = time.monotonic()
    health = watched(rig, lambda: now)
    gate = threading.Event()

    class SlowStore(dict[str, LoraWeights]):
        def __getitem__(self, name: str) -> LoraWeights:
            gate.wait(20)
            return super().__getitem__(name)

    rig.adapters = SlowStore(rig.adapters)
    answer = asyncio.create_task(rig.tokens(PROMPT, "wide"))
    await until(lambda: rig.engine.stats().num_waiting == 1)
    await rig.tokens(PROMPT)
    now = time.monotonic() + 61
    assert health.trouble() is None
    gate.set()
    assert len(await answer) == 16


async def test_what_the_engine_logs_of_a_request_carries_its_ids_and_not_its_words(
    rig: Rig, faults: Faults, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    request = replace(rig.request(PROMPT, tenant="acme"), asked_by=AskedBy("req_1", "0af7651916cd43dd8448eb211c80319c"))
    ids = {"sequence_id": request.request_id, "request_id": "req_1", "trace_id": request.log_ids["trace_id"]}
    with monkeypatch.context() as patch:
        patch.setattr(Response, "finish", fail)
        [chunk async for chunk in rig.engine.generate(request)]
    faults.before = lambda runner, plan: 1 / len([work for work in plan.work if work.sequence.request is not request])
    [chunk async for chunk in rig.engine.generate(request)]
    ended, failed = (record.__dict__ for record in caplog.records if record.name.startswith("service.engine"))
    assert {name: ended[name] for name in ids} == ids and ended["tenant"] == "acme"
    assert failed["sequences"] == [{**ids, "tenant": "acme"}]


async def test_who_observes_cannot_stop_the_engine(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(report: SequenceReport) -> None:
        raise RuntimeError("no room for another series")

    monkeypatch.setattr(rig.ear, "sequence_finished", refuse)
    assert len(await rig.tokens(PROMPT)) == 16
    assert len(await rig.tokens(PROMPT)) == 16
    assert rig.engine.stats().num_restarts == 0


async def test_a_fault_in_the_last_words_of_an_answer_ends_that_answer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Response, "finish", fail)
    last = (await rig.ask(PROMPT))[-1]
    assert last.finish_reason is FinishReason.ERROR and last.error == "internal error while writing the answer"
    assert rig.engine.stats().num_restarts == 0


def test_crashes_count_for_as_long_as_the_window() -> None:
    now = 0.0
    limit = CrashLimit(2, 10.0, clock=lambda: now)
    assert [limit.exceeded_by_another() for _ in range(2)] == [False, False]
    now = 11.0
    assert [limit.exceeded_by_another() for _ in range(3)] == [False, False, True]
