"""The engine in a process of its own: the same answers, refusals and ends as in this one; it survives a death."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from adapters.peft_format import write_adapter
from adapters.store import AdapterStore
from service.config import Settings
from service.engine.base_model import BaseModel, load_base_model
from service.engine.engine import Engine
from service.engine.engine_config import EngineConfig
from service.engine.engine_host import ORPHANED
from service.engine.engine_process import EngineProcess
from service.engine.errors import (
    AdapterUnavailableError,
    BaseModelError,
    EngineDeadError,
    QueueFullError,
    RequestRejectedError,
)
from service.engine.grammar_compiler import GrammarCompiler
from service.engine.grammar_source import choice
from service.engine.messages import Ready
from service.engine.remote_engine import RemoteEngine
from service.engine.sequence import FinishReason, GenerationRequest, OutputChunk, SamplingParams, SequenceReport
from service.engine.serving_engine import ServingEngine
from service.engine.triggered_grammar import TriggeredGrammar
from tests.adapters.loras import random_lora
from tests.service.engine.conftest import Ear

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

PATIENCE_SECONDS = 60.0
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def settings_of(directory: Path, base_dir: Path, **settings: Any) -> Settings:
    usual = {"quantization": "none", "kv_cache_bytes": 8 << 20, "training": False, "log_level": "error"}
    return Settings(base=str(base_dir), data_dir=directory, **{**usual, **settings})


class Remote:
    """An engine in its own process, and one here on the same weights to compare with."""

    def __init__(self, directory: Path, base_dir: Path, **settings: Any) -> None:
        self.settings = settings_of(directory, base_dir, **settings)
        self.ear = Ear()
        self.pids: list[int] = []
        self.engine = RemoteEngine(self._start, self.ear)
        self._count = 0

    def _start(self) -> EngineProcess:
        process = EngineProcess(self.settings)
        self.pids.append(process.pid)
        return process

    def request(
        self, sampling: SamplingParams = GREEDY, adapter: str | None = None, pooling: bool = False, tenant: str = "t"
    ) -> GenerationRequest:
        self._count += 1
        return GenerationRequest(f"r{self._count}", (5, 6, 7, 8, 9), sampling, tenant, adapter, pooling=pooling)


@contextmanager
def remote_engine(directory: Path, base_dir: Path, **settings: Any) -> Iterator[Remote]:
    remote = Remote(directory, base_dir, **settings)
    try:
        yield remote
    finally:
        remote.engine.shutdown(0.0)


@pytest.fixture(scope="module")
def remote(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    with remote_engine(tmp_path_factory.mktemp("remote"), tiny_llama_dir) as running:
        yield running


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> BaseModel:
    return load_base_model(str(tiny_llama_dir), quantization="none")


async def answer(engine: ServingEngine, request: GenerationRequest) -> list[OutputChunk]:
    async with asyncio.timeout(PATIENCE_SECONDS), aclosing(engine.generate(request)) as chunks:
        return [chunk async for chunk in chunks]


def tokens(chunks: list[OutputChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


async def test_it_answers_as_the_engine_in_this_process_does(remote: Remote, base: BaseModel) -> None:
    adapter = random_lora(base.signature, seed=4)
    directory = remote.settings.data_dir / "adapter"
    directory.mkdir()
    write_adapter(directory, adapter, base_name=base.name, base=base.signature)
    store = AdapterStore(f"{remote.settings.resolved_storage_url}/adapters", remote.settings.data_dir / "here")
    digest = store.publish(directory)
    here = Engine(base, {digest: adapter}.__getitem__, EngineConfig(kv_cache_bytes=8 << 20), Ear())
    here.start()
    try:
        for wanted in (None, digest):
            sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2)
            there = await answer(remote.engine, remote.request(sampling, wanted))
            same = await answer(here, remote.request(sampling, wanted))
            assert tokens(there) == tokens(same) and len(tokens(there)) == 12
            assert [c.logprobs for c in there if c.logprobs] == [c.logprobs for c in same if c.logprobs]
            assert there[-1].finish_reason is FinishReason.LENGTH
        vector = await remote.engine.embed(remote.request(pooling=True))
        assert np.array_equal(vector, await here.embed(remote.request(pooling=True)))
        await _measures_as(here, remote)
    finally:
        here.shutdown(0.0)


async def _measures_as(here: Engine, remote: Remote) -> None:
    """Prompts and answers, in the chunks and in the reports."""
    asked = [GenerationRequest.probe("probe", (5, 6, 7, 8), "t/drift", priority=-100)]
    asked.append(replace(remote.request(), measure=True))
    for request in asked:
        [*_, there], [*_, same] = await answer(remote.engine, request), await answer(here, request)
        assert (there.prompt_nll, there.answer_nll, there.answer_entropy) == (
            same.prompt_nll,
            same.answer_nll,
            same.answer_entropy,
        )
        assert (there.prompt_nll is None) == (there.answer_nll is not None)
    until(lambda: any(report.request_id == asked[1].request_id for report in remote.ear.reports))
    report = next(report for report in remote.ear.reports if report.request_id == asked[1].request_id)
    assert (report.answer_nll, report.answer_entropy) == (there.answer_nll, there.answer_entropy)


async def test_its_base_is_described_without_the_weights(remote: Remote, base: BaseModel) -> None:
    described = remote.engine.base
    chat = [{"role": "user", "content": "Which tree?"}]
    assert described.render_chat(chat) == base.render_chat(chat)
    assert (described.name, described.fingerprint, described.signature) == (
        base.name,
        base.fingerprint,
        base.signature,
    )
    assert not hasattr(described, "model")


async def test_refusals_come_back_as_what_they_are(remote: Remote) -> None:
    too_long = GenerationRequest("long", tuple([5] * 4000), GREEDY, "t")
    with pytest.raises(RequestRejectedError) as refused:
        await answer(remote.engine, too_long)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "messages"
    with pytest.raises(AdapterUnavailableError):
        await answer(remote.engine, remote.request(adapter="f" * 64))


@pytest.mark.slow
async def test_a_full_queue_names_the_wait(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with remote_engine(tmp_path, tiny_llama_dir, max_waiting=1, max_num_seqs=1) as narrow:
        sampling = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        results = await asyncio.gather(
            *(answer(narrow.engine, narrow.request(sampling)) for _ in range(6)), return_exceptions=True
        )
    full = [result for result in results if isinstance(result, QueueFullError)]
    assert full and all(0 < error.retry_after <= 60 for error in full)
    assert any(isinstance(result, list) for result in results)


async def test_a_grammar_holds_there_as_well(remote: Remote, base: BaseModel) -> None:
    with closing(GrammarCompiler(base)) as compiler:
        grammar = await compiler.compile(choice(["yes", "no"], "choice"))
        triggered = TriggeredGrammar(grammar, "a", max_uses=1)
    for _ in range(2):  # compiled there, then found in its cache
        chunks = await answer(remote.engine, remote.request(SamplingParams(max_tokens=8, grammar=grammar)))
        assert "".join(chunk.text for chunk in chunks) in ("yes", "no")
    order = triggered.order()
    assert (order.trigger, order.max_uses) == ("a", 1)
    chunks = await answer(remote.engine, remote.request(SamplingParams(max_tokens=8, seed=1, grammar=triggered)))
    assert chunks[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


async def test_leaving_aborts_there(remote: Remote) -> None:
    request = remote.request(SamplingParams(max_tokens=500, temperature=0.0, ignore_eos=True))
    async with aclosing(remote.engine.generate(request)) as chunks:
        await anext(chunks)

    def reported() -> SequenceReport | None:
        return next((r for r in remote.ear.reports if r.request_id == request.request_id), None)

    await asyncio.to_thread(until, reported)
    report = reported()
    assert report is not None and report.finish_reason is FinishReason.ABORT
    await asyncio.to_thread(until, lambda: remote.engine.stats().num_running == 0)


async def test_what_is_open_and_what_ended_is_known_at_once(remote: Remote) -> None:
    begin = time.monotonic()
    async with aclosing(remote.engine.generate(remote.request())) as chunks:
        assert (await anext(chunks)).finish_reason is None and remote.engine.num_open == 1
        while (await anext(chunks)).finish_reason is None:
            pass
        assert remote.engine.num_open == 0
    assert begin < (remote.engine.last_ended_at or 0.0) <= time.monotonic()


async def test_a_process_that_stands_still_shows_in_the_stats(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.remote_engine.SILENCE_SECONDS", 1.5)
    await asyncio.to_thread(until, lambda: remote.engine.stats().busy_since is None)
    os.kill(remote.pids[-1], signal.SIGSTOP)
    try:
        await asyncio.to_thread(until, lambda: remote.engine.stats().busy_since is not None)
    finally:
        os.kill(remote.pids[-1], signal.SIGCONT)
    await asyncio.to_thread(until, lambda: remote.engine.stats().busy_since is None)


@pytest.mark.slow
def test_a_base_that_cannot_be_loaded_is_told_to_the_operator(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="nowhere"):
        Remote(tmp_path, tmp_path / "nowhere")


@pytest.mark.slow
def test_after_a_death_those_who_waited_hear_of_it_and_others_are_served(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with remote_engine(tmp_path, tiny_llama_dir) as mortal:
        chunks: SimpleQueue[OutputChunk] = SimpleQueue()
        mortal.engine.submit(mortal.request(SamplingParams(max_tokens=500, ignore_eos=True)), chunks.put)
        chunks.get(timeout=PATIENCE_SECONDS)
        os.kill(mortal.pids[0], signal.SIGKILL)
        last = chunks.get(timeout=PATIENCE_SECONDS)
        while last.finish_reason is None:
            last = chunks.get(timeout=PATIENCE_SECONDS)
        assert last.finish_reason is FinishReason.ERROR and "restarting" in (last.error or "")
        with pytest.raises(EngineDeadError, match="restarting"):
            mortal.engine.submit(mortal.request(), chunks.put)
        assert mortal.engine.stats().restarting and mortal.engine.stats().alive
        until(lambda: not mortal.engine.stats().restarting)
        assert len(tokens(asyncio.run(answer(mortal.engine, mortal.request())))) == 12
        stats = mortal.engine.stats()
        assert stats.num_restarts == 1 and stats.alive and len(mortal.pids) == 2


@pytest.mark.slow
def test_too_many_deaths_are_the_end(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.remote_engine.MAX_DEATHS", 1)
    with remote_engine(tmp_path, tiny_llama_dir) as mortal:
        for _ in range(2):
            num_processes = len(mortal.pids)
            os.kill(mortal.pids[-1], signal.SIGKILL)
            until(lambda n=num_processes: len(mortal.pids) > n or not mortal.engine.stats().alive)  # type: ignore[misc]
            until(lambda: not mortal.engine.stats().restarting)
        assert not mortal.engine.stats().alive and "too often" in (mortal.engine.stats().error or "")
        with pytest.raises(EngineDeadError, match="too often"):
            mortal.engine.submit(mortal.request(), lambda chunk: None)


@pytest.mark.slow
def test_an_engine_whose_service_is_gone_ends_itself(tiny_llama_dir: Path, tmp_path: Path) -> None:
    process = EngineProcess(settings_of(tmp_path, tiny_llama_dir))
    assert isinstance(process.line.receive(), Ready)
    process.line.close()
    until(lambda: process.ended)
    assert process.describe_end() == f"exit status {ORPHANED}"
