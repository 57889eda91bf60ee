"""The canary: thousands of mixed requests while adapters come, go and are retrained; no answer is another adapter's.

`ROOTSTOCK_TEST_CANARY_REQUESTS` sets how many requests are sent.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.peft_format import read_adapter, write_adapter
from adapters.store import AdapterStore
from service.engine.base_model import BaseModel, load_base_model
from service.engine.engine import Engine
from service.engine.engine_config import EngineConfig
from service.engine.errors import AdapterUnavailableError
from service.engine.sequence import FinishReason, GenerationRequest, SamplingParams
from tests.service.canaries import PROMPT_TOKENS, Canaries, Canary, write_canary_base
from tests.service.engine.conftest import Ear

pytestmark = pytest.mark.anyio

NUM_REQUESTS = int(os.environ.get("ROOTSTOCK_TEST_CANARY_REQUESTS", "3000"))
NUM_ALIASES = 24
NUM_CLIENTS = 40


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def canary_base(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    directory = tmp_path_factory.mktemp("canary-base")
    write_canary_base(tiny_llama_dir, directory)
    return load_base_model(str(directory), quantization="none")


class Aviary:
    """Aliases that point at adapters in a real store, and what each digest must answer."""

    def __init__(self, base: BaseModel, directory: Path) -> None:
        self.base = base
        self._directory = directory
        self.store = AdapterStore(str(directory / "store"), directory / "cache")
        self._canaries = Canaries(base)
        self.aliases: dict[str, str] = {}
        self.birds: dict[str, Canary] = {}
        self.deleted: set[str] = set()
        for index in range(NUM_ALIASES):
            self.retrain(f"alias-{index}")

    def retrain(self, alias: str) -> str | None:
        """The alias points at a new adapter with a new name; the digest it pointed at before."""
        canary = self._canaries.make()
        directory = self._directory / f"built-{len(self.birds)}"
        write_adapter(directory, canary.weights, base_name="tiny", base=replace(self.base.signature, names=frozenset()))
        digest = self.store.publish(directory)
        self.birds[digest] = canary
        before, self.aliases[alias] = self.aliases.get(alias), digest
        return before

    def delete(self, digest: str, engine: Engine) -> None:
        self.deleted.add(digest)
        engine.retire(digest)
        self.store.delete(digest)

    def engine(self, ear: Ear) -> Iterator[Engine]:
        signature = replace(self.base.signature, names=frozenset())
        config = EngineConfig(
            kv_cache_bytes=3 << 20,
            max_num_seqs=12,
            max_num_batched_tokens=128,
            prefill_chunk=24,
            max_lora_slots=5,
            max_host_adapters=9,
        )
        engine = Engine(self.base, lambda d: read_adapter(self.store.read(d), signature, max_rank=64), config, ear)
        engine.start()
        yield engine
        engine.shutdown(0)


@pytest.mark.timeout(600 + NUM_REQUESTS // 2)
@pytest.mark.slow
async def test_no_answer_ever_carries_another_adapters_name(
    canary_base: BaseModel, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    aviary, ear, rng = Aviary(canary_base, tmp_path), Ear(), random.Random(11)
    counts: Counter[str] = Counter()
    shared = [
        rng.choices(PROMPT_TOKENS, k=length) for length in (48, 55)
    ]  # few-shot prompts that many requests begin with

    def request(number: int, digest: str) -> GenerationRequest:
        prompt = rng.choices(PROMPT_TOKENS, k=rng.randrange(1, 20))
        if rng.random() < 0.4:
            prompt = rng.choice(shared) + prompt
        sampling = SamplingParams(temperature=0.0, max_tokens=rng.randrange(2, 14), ignore_eos=True)
        timeout = 0.02 if rng.random() < 0.02 else None
        tenant = f"tenant-{rng.randrange(5)}"
        priority = rng.choice([0, 0, 0, 5, -3])
        return GenerationRequest(
            f"canary-{number}", tuple(prompt), sampling, tenant, digest, priority, timeout_seconds=timeout
        )

    async def ask(engine: Engine, number: int) -> None:
        digest = rng.choice(list(aviary.aliases.values()))
        tokens: list[int] = []
        leaves = rng.random() < 0.05
        reason, error = None, None
        asked = request(number, digest)
        stream = engine.generate(asked)
        try:
            async for chunk in stream:
                tokens += chunk.token_ids
                reason, error = chunk.finish_reason, chunk.error
                if leaves and tokens:
                    await stream.aclose()
                    break
        except AdapterUnavailableError as unavailable:
            assert digest in aviary.deleted, unavailable
            reason = FinishReason.ERROR
        counts["requests"] += 1
        counts["wrong"] += not aviary.birds[digest].says(tokens)
        counts[str(reason) if reason else "left"] += 1
        if reason is FinishReason.ERROR:
            assert digest in aviary.deleted, error
        elif reason is FinishReason.LENGTH:
            assert len(tokens) == asked.sampling.max_tokens
            counts["tokens"] += len(tokens)

    async def client(engine: Engine, numbers: Iterator[int]) -> None:
        for number in numbers:
            await ask(engine, number)
            if rng.random() < 0.02:
                old = aviary.retrain(rng.choice(list(aviary.aliases)))
                counts["retrained"] += 1
                if old is not None and rng.random() < 0.7:
                    aviary.delete(old, engine)
                    counts["deleted"] += 1

    for engine in aviary.engine(ear):
        numbers = iter(range(NUM_REQUESTS))
        await asyncio.gather(*(client(engine, numbers) for _ in range(NUM_CLIENTS)))
        counts["preempted"] = engine.stats().num_preemptions
    counts["loads"], counts["evictions"] = len(ear.loads), ear.evictions.count("capacity")
    for name, count in counts.items():
        record_property(name, count)
    print(f"\ncanary: {dict(counts)}")
    assert counts["requests"] == NUM_REQUESTS
    assert counts["wrong"] == 0
    assert counts["length"] > 0.85 * NUM_REQUESTS, "most must have been answered, or this shows little"
    assert all(counts[what] for what in ("retrained", "deleted", "left", "evictions", "preempted")), counts


async def test_the_canary_notices_a_wrong_adapter(canary_base: BaseModel, tmp_path: Path) -> None:
    """Each kind says its own name, and another's name is told apart: else the test above could not fail."""
    aviary, ear = Aviary(canary_base, tmp_path), Ear()
    digests = list(aviary.birds)[:8]
    for engine in aviary.engine(ear):
        for digest in digests:
            sampling = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
            asked = GenerationRequest(digest, tuple(PROMPT_TOKENS[3:30]), sampling, "t", digest)
            tokens = [token async for chunk in engine.generate(asked) for token in chunk.token_ids]
            assert [other for other in digests if aviary.birds[other].says(tokens)] == [digest]
