"""Reuse of computed prompt beginnings: the same bits as without, the same key or nothing, no leak, nobody stuck."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from service.engine.base_model import BaseModel
from service.engine.kv_cache import KvCache, KvCacheFullError, LayerShape, Row, block_tokens
from service.engine.prefix_cache import PrefixCache
from service.engine.sequence import GenerationRequest, OutputChunk, SamplingParams, Sequence, SequenceStatus
from tests.service.engine.conftest import SPECS, Rig

pytestmark = pytest.mark.anyio

BLOCK = 32


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, 500) for _ in range(length)]


def make_rig(base: BaseModel, **config: Any) -> Rig:
    """An engine with the chunks of production."""
    return Rig(base, **{"prefill_chunk": 128, "max_num_batched_tokens": 256, **config})


@pytest.fixture(params=["none", "nf4"])
def either_base(request: pytest.FixtureRequest, base: BaseModel, nf4_base: BaseModel) -> BaseModel:
    return base if request.param == "none" else nf4_base


@pytest.fixture
def warm(base: BaseModel) -> Iterator[Rig]:
    rig = make_rig(base)
    yield rig
    rig.engine.shutdown(0)


async def answer(rig: Rig, tokens: list[int], adapter: str | None = None, **asked: Any) -> tuple[list[Any], int]:
    """Tokens with their exact log-probabilities, and how much of the prompt was copied."""
    chunks: list[OutputChunk] = await rig.ask(tokens, adapter, **{"logprobs": 3, "max_tokens": 8, **asked})
    logprobs = [(one.token_id, one.logprob, [t.logprob for t in one.top]) for c in chunks for one in c.logprobs or ()]
    return logprobs, chunks[-1].num_cached_tokens


# -- the same bits ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, "wide", "attention"])
async def test_an_answer_has_the_same_bits_with_and_without_the_cache(
    either_base: BaseModel, adapter: str | None
) -> None:
    """Prompts that share 0 … 300 tokens with one computed before, with tails of every awkward length."""
    long = prompt(300)
    cold, hot = make_rig(either_base, prefix_cache="off"), make_rig(either_base)
    await answer(hot, long, adapter)
    lengths = (31, 32, 33, 63, 100, 128, 130, 170, 200, 256, 299)
    shared = [(n, tail) for index, n in enumerate(lengths) for tail in ((1, 30) if index % 2 else (2, 5))]
    for n, tail in shared:
        asked = long[:n] + prompt(tail, seed=1000 + n)
        expected, none = await answer(cold, asked, adapter)
        got, cached = await answer(hot, asked, adapter)
        assert got == expected, (n, tail)
        assert none == 0 and cached in (n // BLOCK * BLOCK, (n + tail - 4) // BLOCK * BLOCK), (n, tail, cached)
    for rig in (cold, hot):
        rig.engine.shutdown(0)


@pytest.mark.slow
async def test_short_prompts_serve_longer_ones_and_the_other_way_round(either_base: BaseModel) -> None:
    """What was computed in a short last chunk has the bits of a long one's."""
    long = prompt(400)
    cold = make_rig(either_base, prefix_cache="off")
    expected = {n: (await answer(cold, long[:n]))[0] for n in (70, 140, 165, 201, 230, 399)}
    cold.engine.shutdown(0)
    for order in (sorted(expected), sorted(expected, reverse=True)):
        hot = make_rig(either_base)
        got = {n: await answer(hot, long[:n]) for n in order}
        hot.engine.shutdown(0)
        assert {n: tokens for n, (tokens, _) in got.items()} == expected
        assert sum(cached for _, cached in got.values()) >= 5 * 64


async def test_chunks_of_any_size_reuse_on_a_grid_that_fits_them(base: BaseModel) -> None:
    assert [block_tokens(chunk) for chunk in (128, 512, 48, 24, 100, 7)] == [32, 32, 16, 8, 100, 7]
    for chunk in (24, 100, 7):
        cold, hot = (make_rig(base, prefill_chunk=chunk, prefix_cache=mode) for mode in ("off", "tenant"))
        expected, _ = await answer(cold, prompt(150))
        await answer(hot, prompt(150)[:120])
        got, cached = await answer(hot, prompt(150))
        for rig in (cold, hot):
            rig.engine.shutdown(0)
        assert got == expected and cached == 120 // block_tokens(chunk) * block_tokens(chunk)


@pytest.mark.slow
async def test_preempted_sequences_go_on_with_the_same_tokens(base: BaseModel) -> None:
    asked = [prompt(60) + prompt(30, seed=n) for n in range(6)]
    small = make_rig(base, kv_cache_bytes=2 * 512 * base.model.config.num_hidden_layers * 2 * 2 * 32 * 4)
    cold = make_rig(base, prefix_cache="off")
    expected = [await cold.tokens(p, max_tokens=110) for p in asked]
    got = await asyncio.gather(*(small.tokens(p, max_tokens=110) for p in asked))
    preempted = small.engine.stats().num_preemptions
    for rig in (cold, small):
        rig.engine.shutdown(0)
    assert preempted > 0, "the budget must be too small for all, or this test shows nothing"
    assert got == expected


# -- whose --------------------------------------------------------------------------------------------------------


async def ask_as(rig: Rig, tenant: str, adapter: str | None, **asked: Any) -> tuple[list[int], int]:
    request = rig.request(prompt(100), adapter, tenant, max_tokens=4, **asked)
    chunks = [chunk async for chunk in rig.engine.generate(request)]
    return [t for c in chunks for t in c.token_ids], chunks[-1].num_cached_tokens


async def test_nothing_is_shared_across_tenants_or_adapters(warm: Rig, base: BaseModel) -> None:
    cold = make_rig(base, prefix_cache="off")
    keys = [("acme", None), ("other", None), ("acme", "wide"), ("acme", "narrow"), ("other", "wide")]
    for tenant, adapter in keys:
        expected = await ask_as(cold, tenant, adapter)
        assert await ask_as(warm, tenant, adapter) == expected, "the first of its key finds nothing"
    for tenant, adapter in keys:
        tokens, cached = await ask_as(warm, tenant, adapter)
        assert (tokens, cached) == ((await ask_as(cold, tenant, adapter))[0], 96)
    cold.engine.shutdown(0)


async def test_tenants_share_when_told_so_but_adapters_never_do(base: BaseModel) -> None:
    rig = make_rig(base, prefix_cache="shared")
    asked = [("acme", None), ("other", None), ("acme", "wide"), ("other", "wide"), ("other", "narrow")]
    cached = [(await ask_as(rig, tenant, adapter))[1] for tenant, adapter in asked]
    rig.engine.shutdown(0)
    assert cached == [0, 96, 0, 96, 0]


async def test_a_deleted_adapter_takes_what_it_computed_along_at_once(warm: Rig) -> None:
    cache = warm.engine._machinery.residency.cache
    await ask_as(warm, "acme", None)
    of_the_base = cache.num_blocks
    await ask_as(warm, "acme", "wide")
    assert cache.num_blocks == 2 * of_the_base
    warm.engine.retire("wide")
    await warm.tokens([5], max_tokens=1)  # a step later the command has been taken
    assert cache.num_blocks == of_the_base
    assert (await ask_as(warm, "acme", None))[1] == 96
    assert (await ask_as(warm, "acme", "wide"))[1] == 0


async def test_an_adapter_deleted_while_it_computes_leaves_nothing(warm: Rig) -> None:
    stream = warm.engine.generate(warm.request(prompt(300), "wide", max_tokens=20))
    await anext(stream)
    warm.engine.retire("wide")
    assert [chunk async for chunk in stream]
    assert warm.engine._machinery.residency.cache.num_blocks == 0


# -- together -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, "wide"])
async def test_choices_of_one_prompt_compute_it_once(either_base: BaseModel, adapter: str | None) -> None:
    cold, hot = make_rig(either_base, prefix_cache="off"), make_rig(either_base)
    asked: list[dict[str, Any]] = [{"temperature": 1.0, "seed": seed} for seed in range(5)]
    expected = [await answer(cold, prompt(200), adapter, **one) for one in asked]
    got = await asyncio.gather(*(answer(hot, prompt(200), adapter, **one) for one in asked))
    for rig in (cold, hot):
        rig.engine.shutdown(0)
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in expected]
    assert len({str(tokens) for tokens, _ in got}) > 1, "the seeds must differ, or this test shows nothing"
    assert sorted(cached for _, cached in got) == [0, 192, 192, 192, 192]


async def test_others_go_on_when_the_one_they_wait_for_leaves(warm: Rig, base: BaseModel) -> None:
    cold = make_rig(base, prefix_cache="off")
    expected = await cold.tokens(prompt(400))
    cold.engine.shutdown(0)
    requests = [warm.request(prompt(400)) for _ in range(4)]
    tasks = [asyncio.create_task(_collect(warm, request)) for request in requests]
    while not warm.engine.stats().num_running:
        await asyncio.sleep(0)
    tasks[0].cancel()
    got = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(got[0], asyncio.CancelledError) and got[1:] == [expected] * 3


async def _collect(rig: Rig, request: GenerationRequest) -> list[int]:
    return [t async for chunk in rig.engine.generate(request) for t in chunk.token_ids]


@pytest.mark.slow
async def test_random_traffic_over_a_tiny_cache_answers_as_without_it(base: BaseModel) -> None:
    """Arrivals, aborts and deletions over few adapters, tenants and prompts that share beginnings."""
    rng = random.Random(2)
    stems = [prompt(length, seed=length) for length in (20, 70, 150)]
    per_slab = 512 * base.model.config.num_hidden_layers * 2 * 2 * 32 * 4
    tiny = make_rig(base, kv_cache_bytes=6 * per_slab, max_lora_slots=2, max_num_seqs=5)
    cold = make_rig(base, prefix_cache="off")
    answers: dict[tuple[Any, ...], list[int]] = {}

    async def one(number: int) -> int:
        stem = rng.choice(stems)
        tokens = stem[: rng.choice([len(stem), len(stem), 40])] + prompt(rng.choice([0, 1, 7, 40]), seed=number % 7)
        adapter, tenant = rng.choice([None, *list(SPECS)[:3]]), rng.choice(["acme", "other"])
        length = rng.choice([1, 12, 60])
        for _ in range(rng.randrange(40)):
            await asyncio.sleep(0)
        request = tiny.request(tokens, adapter, tenant, max_tokens=length)
        stream = tiny.engine.generate(request)
        if rng.random() < 0.2:
            await anext(stream)
            await stream.aclose()
            return 0
        chunks = [chunk async for chunk in stream]
        if adapter and rng.random() < 0.1:
            tiny.engine.retire(adapter)
        key = (*tokens, adapter, length)
        if key not in answers:
            answers[key] = await cold.tokens(tokens, adapter, max_tokens=length)
        assert [t for c in chunks for t in c.token_ids] == answers[key]
        return chunks[-1].num_cached_tokens

    cached = [n for _ in range(4) for n in await asyncio.gather(*(one(number) for number in range(30)))]
    residency = tiny.engine._machinery.residency
    for rig in (tiny, cold):
        rig.engine.shutdown(10)
    residency.check_integrity([])
    assert sum(cached) > 1000 and residency.cache.usage == 0


# -- the tree alone -----------------------------------------------------------------------------------------------


def small_cache(num_slabs: int = 4) -> tuple[KvCache, PrefixCache]:
    cache = KvCache(
        [LayerShape(1, 4, 4)],
        max_bytes=num_slabs * 128 * 8 * 4,
        max_model_len=128,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return cache, PrefixCache(cache, shared=False)


def running(tokens: list[int], **asked: Any) -> Sequence:
    request = GenerationRequest(f"r{tokens[0]}", tuple(tokens), SamplingParams(), **{"tenant": "t", **asked})
    return Sequence(request, 100, status=SequenceStatus.RUNNING)


def compute(cache: KvCache, prefixes: PrefixCache, sequence: Sequence) -> Row:
    """What the engine does to a prompt; keys and values become the tokens themselves."""
    known = prefixes.match(sequence)
    assert known is not None
    row = cache.allocate(sequence.num_prompt_tokens)
    prefixes.fetch(sequence, row, known)
    tokens = torch.tensor(sequence.request.prompt_token_ids, dtype=torch.float32)
    for buffer in (cache.layers[0].keys, cache.layers[0].values):
        view = cache.rows(buffer, 1, row, row.index + 1)[0]
        assert torch.equal(view[:known], tokens[:known, None].expand(-1, 4)), "copied tokens are the prompt's"
        view[known : len(tokens)] = tokens[known:, None]
    sequence.num_computed = sequence.num_prompt_tokens
    prefixes.keep(sequence, row)
    return row


def test_kept_blocks_are_free_memory() -> None:
    cache, prefixes = small_cache(num_slabs=4)
    for seed in range(8):
        sequence = running(prompt(100, seed))
        cache.free(compute(cache, prefixes, sequence))
        prefixes.leave(sequence)
    assert cache.usage == 0 and cache.num_blocks > 4
    rows = [cache.allocate(128) for _ in range(4)]
    assert cache.num_blocks == 0, "every slab was wanted"
    with pytest.raises(KvCacheFullError):
        cache.allocate(1)
    for row in rows:
        cache.free(row)
    prefixes.check_integrity(is_idle=True)


def test_the_least_recently_used_goes_first() -> None:
    cache, prefixes = small_cache(num_slabs=3)
    often = running(prompt(40, seed=99))
    cache.free(compute(cache, prefixes, often))
    for seed in range(20):
        for sequence in (running(prompt(70, seed)), running(prompt(40, seed=99))):
            cache.free(compute(cache, prefixes, sequence))
    assert prefixes.match(running(prompt(40, seed=99))) == 32
    assert prefixes.match(running(prompt(70, seed=0))) == 0 and prefixes.match(running(prompt(70, seed=19))) == 64
    prefixes.check_integrity(is_idle=True)


def test_somebody_is_always_computed_and_the_last_tokens_are_never_copied() -> None:
    cache, prefixes = small_cache()
    assert prefixes.match(running(prompt(100))) == 0
    compute(cache, prefixes, running(prompt(100)))
    lengths = {n: prefixes.match(running(prompt(100)[:n])) for n in (31, 32, 35, 36, 64, 67, 68, 100)}
    assert lengths == {31: 0, 32: 0, 35: 0, 36: 32, 64: 32, 67: 32, 68: 64, 100: 96}


def test_one_computes_what_several_ask_for_and_only_its_own_tenant_waits() -> None:
    cache, prefixes = small_cache()
    first, same, urgent, other = (running(prompt(100), **k) for k in ({}, {}, {"priority": 1}, {"tenant": "u"}))
    row = cache.allocate(100)
    prefixes.fetch(first, row, 0)
    assert [prefixes.match(s) for s in (first, same, urgent, other)] == [0, None, 0, 0]
    first.status = SequenceStatus.WAITING
    assert prefixes.match(same) == 0, "nobody waits for a sequence that does not run"
    first.status, first.num_computed = SequenceStatus.RUNNING, 64
    prefixes.keep(first, row)
    assert prefixes.match(same) is None, "it is still computing a block of this prompt"
    prefixes.leave(first)
    assert prefixes.match(same) == 64
    prefixes.check_integrity(is_idle=True)
    prefixes.drop("no such adapter")
    assert prefixes.match(same) == 64


def test_without_memory_to_spare_nobody_waits_in_vain() -> None:
    cache, prefixes = small_cache(num_slabs=2)
    first, same = running(prompt(100)), running(prompt(100))
    rows = [cache.allocate(100)]
    prefixes.fetch(first, rows[0], 0)
    rows.append(cache.allocate(100))
    assert prefixes.match(same) is None
    first.num_computed = 64
    prefixes.keep(first, rows[0])
    assert prefixes.match(same) == 0 and cache.num_blocks == 0
    for row in rows:
        cache.free(row)
    prefixes.check_integrity(is_idle=True)
