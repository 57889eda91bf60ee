"""The engine as a whole, on a real small model: the same tokens as PEFT, and the same alone as in any crowd."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from adapters.peft_format import write_adapter
from service.engine.base_model import BaseModel
from service.engine.engine import Engine
from service.engine.engine_config import EngineConfig
from service.engine.errors import AdapterUnavailableError, EngineDeadError, QueueFullError, RequestRejectedError
from service.engine.sequence import FinishReason, GenerationRequest, OutputChunk, SamplingParams
from tests.service.engine.conftest import SPECS, Ear, Rig

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def prompts(num: int, longest: int = 90) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(5, 500) for _ in range(rng.choice([1, 5, 23, 24, 25, 48, longest]))] for _ in range(num)]


@pytest.fixture(scope="module")
def peft_models(tiny_llama_dir: Path, base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PeftModel]:
    """Every adapter of the rig in plain PEFT on the plain model, loaded from the files we write."""
    rig = Rig(base)
    rig.engine.shutdown(0)
    model = None
    for name, weights in rig.adapters.items():
        directory = tmp_path_factory.mktemp(name)
        write_adapter(directory, weights, base_name=str(tiny_llama_dir), base=base.signature)
        if model is None:
            plain = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
            model = PeftModel.from_pretrained(plain, str(directory), adapter_name=name)
        else:
            model.load_adapter(str(directory), adapter_name=name)
    assert model is not None
    yield model


def peft_greedy(model: PeftModel, adapter: str | None, prompt: list[int], num_tokens: int) -> list[int]:
    """The slow reference: whole sequence again for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            if adapter is None:
                with model.disable_adapter():
                    logits = model(input_ids=torch.tensor([ids])).logits
            else:
                model.set_adapter(adapter)
                logits = model(input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


MIXES: dict[str, list[str | None]] = {
    "none": [None] * 6,
    "identical": ["wide"] * 6,
    "distinct": ["narrow", "wide", "attention", "head"],
    "skewed": ["head", "head", None, "head", "narrow", "head", None, "patterned"],
}


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
async def test_greedy_tokens_equal_plain_peft_row_by_row(mix: str, rig: Rig, peft_models: PeftModel) -> None:
    adapters = MIXES[mix]
    asked = list(zip(prompts(len(adapters)), adapters, strict=True))
    got = await asyncio.gather(*(rig.tokens(p, a) for p, a in asked))
    assert got == [peft_greedy(peft_models, a, p, 16) for p, a in asked]
    differing = {tuple(peft_greedy(peft_models, a, asked[0][0], 16)) for a in SPECS}
    assert len(differing) == len(SPECS), "the adapters must change the answer, or this test shows nothing"


async def test_log_probabilities_equal_plain_peft(rig: Rig, peft_models: PeftModel) -> None:
    prompt = prompts(3)[2]
    for adapter in (None, *SPECS):
        chunks = await rig.ask(prompt, adapter, max_tokens=1, logprobs=5)
        [logprob] = chunks[0].logprobs or ()
        with torch.no_grad():
            if adapter is None:
                with peft_models.disable_adapter():
                    logits = peft_models(input_ids=torch.tensor([prompt])).logits
            else:
                peft_models.set_adapter(adapter)
                logits = peft_models(input_ids=torch.tensor([prompt])).logits
        expected = torch.log_softmax(logits[0, -1], dim=-1).topk(5)
        assert [t.token_id for t in logprob.top] == expected.indices.tolist()
        torch.testing.assert_close(
            torch.tensor([t.logprob for t in logprob.top]), expected.values, atol=1e-4, rtol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 11}])
async def test_an_answer_is_the_same_alone_and_in_a_crowd(
    quantization: str, sampling: dict[str, float], base: BaseModel, nf4_base: BaseModel
) -> None:
    rig = Rig(base if quantization == "none" else nf4_base)
    rng = random.Random(3)
    asked = [(p, rng.choice([None, *SPECS])) for p in prompts(14)]
    alone = [await rig.tokens(p, a, **sampling) for p, a in asked]
    crowd = await asyncio.gather(*(rig.tokens(p, a, **sampling) for p, a in asked))
    rig.engine.shutdown(0)
    assert crowd == alone


@pytest.mark.slow
async def test_preempted_sequences_are_replayed_to_the_same_tokens(base: BaseModel) -> None:
    small = Rig(base, kv_cache_bytes=2 * 512 * base.model.config.num_hidden_layers * 2 * 2 * 32 * 4)
    asked = [(p, a) for p, a in zip(prompts(6), [None, *SPECS], strict=True)]
    alone = [await small.tokens(p, a, max_tokens=110) for p, a in asked]
    before = small.engine.stats().num_preemptions
    crowd = await asyncio.gather(*(small.tokens(p, a, max_tokens=110) for p, a in asked))
    preempted = small.engine.stats().num_preemptions
    small.engine.shutdown(0)
    assert before == 0 and preempted > 0, "the budget must be too small for all, or this test shows nothing"
    assert crowd == alone


async def test_serving_changes_no_base_weight(nf4_base: BaseModel) -> None:
    before = nf4_base.parameter_hash()
    rig = Rig(nf4_base)
    await asyncio.gather(*(rig.tokens(p, a) for p, a in zip(prompts(6), [None, *SPECS], strict=True)))
    rig.engine.shutdown(0)
    assert nf4_base.parameter_hash() == before


@pytest.mark.slow
async def test_requests_join_and_leave_a_running_batch(rig: Rig) -> None:
    long = rig.engine.generate(rig.request([7, 8, 9], max_tokens=200))
    first = [await anext(long) for _ in range(3)]
    short = await rig.tokens([7, 8, 9], max_tokens=4)
    rest = [chunk async for chunk in long]
    tokens = [t for chunk in [*first, *rest] for t in chunk.token_ids]
    assert len(short) == 4 and len(tokens) == 200 and tokens[:4] == short


@pytest.mark.slow
async def test_more_adapters_than_slots_all_get_their_own_answer(base: BaseModel, rig: Rig) -> None:
    tight = Rig(base, max_lora_slots=1)
    got = await asyncio.gather(*(tight.tokens([5, 6, 7], a) for a in list(SPECS) * 2))
    tight.engine.shutdown(0)
    assert got == [await rig.tokens([5, 6, 7], a) for a in list(SPECS) * 2]
    assert tight.ear.evictions.count("capacity") >= len(SPECS) - 1


async def test_a_missing_adapter_ends_that_request_alone(rig: Rig) -> None:
    fine, lost = await asyncio.gather(rig.tokens([5]), rig.ask([5], "deleted"), return_exceptions=True)
    assert isinstance(fine, list) and len(fine) == 16
    assert isinstance(lost, AdapterUnavailableError) and str(lost) == "no adapter deleted"


async def test_closing_the_stream_frees_the_sequence(rig: Rig) -> None:
    stream = rig.engine.generate(rig.request([5, 6], "wide", max_tokens=400))
    await anext(stream)
    await stream.aclose()
    await rig.tokens([5], max_tokens=1)  # a step later the abort has been taken
    stats = rig.engine.stats()
    assert (stats.num_running, stats.kv_usage) == (0, 0.0)
    assert rig.ear.reports[0].finish_reason is FinishReason.ABORT


async def test_finish_reasons_and_counts(rig: Rig, base: BaseModel) -> None:
    plain = await rig.ask([5, 6, 7], max_tokens=8)
    assert plain[-1].finish_reason is FinishReason.LENGTH
    assert (plain[-1].num_prompt_tokens, plain[-1].num_output_tokens) == (3, 8)
    tokens = [t for c in plain for t in c.token_ids]
    stopped = await rig.ask([5, 6, 7], max_tokens=8, stop_token_ids=(tokens[4],))
    assert stopped[-1].finish_reason is FinishReason.STOP
    assert [t for c in stopped for t in c.token_ids] == tokens[: tokens.index(tokens[4]) + 1]
    text = "".join(c.text for c in plain)
    cut = text[len(text) // 2 :][:2]
    by_string = await rig.ask([5, 6, 7], max_tokens=8, stop=(cut,))
    assert by_string[-1].finish_reason is FinishReason.STOP
    assert "".join(c.text for c in by_string) == text[: text.index(cut)]
    whole = await rig.ask([5] * 500, max_tokens=None)
    assert whole[-1].num_output_tokens == base.max_model_len - 500


async def test_impossible_requests_are_rejected_before_they_wait(rig: Rig) -> None:
    for prompt, code in (([], "invalid_prompt"), ([5] * 512, "context_length_exceeded"), ([512], "invalid_prompt")):
        with pytest.raises(RequestRejectedError) as rejection:
            await rig.tokens(prompt)
        assert rejection.value.code == code


@pytest.mark.slow
async def test_a_full_queue_says_when_to_come_back(base: BaseModel) -> None:
    rig = Rig(base, max_waiting=2, max_num_seqs=1)
    streams = [asyncio.create_task(rig.tokens([5], max_tokens=300)) for _ in range(12)]
    results = await asyncio.gather(*streams, return_exceptions=True)
    rig.engine.shutdown(0)
    refused = [r for r in results if isinstance(r, QueueFullError)]
    assert refused and all(0 < r.retry_after <= 60 for r in refused)
    assert all(len(r) == 300 for r in results if isinstance(r, list))


@pytest.mark.slow
async def test_draining_lets_answers_finish_and_takes_nothing_new(base: BaseModel) -> None:
    rig = Rig(base)
    running = asyncio.create_task(rig.tokens([5], max_tokens=120))
    while not rig.engine.stats().num_running:
        await asyncio.sleep(0)
    drained = asyncio.get_running_loop().run_in_executor(None, rig.engine.shutdown, 30)
    while not rig.engine._intake.draining:
        await asyncio.sleep(0)
    with pytest.raises(EngineDeadError):
        await rig.tokens([5])
    assert len(await running) == 120
    await drained
    assert not rig.engine.stats().alive


async def test_a_shutdown_without_patience_ends_streams_with_an_error(base: BaseModel) -> None:
    rig = Rig(base)
    stream = rig.engine.generate(rig.request([5], max_tokens=500))
    await anext(stream)
    await asyncio.get_running_loop().run_in_executor(None, rig.engine.shutdown, 0)
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].finish_reason is FinishReason.ERROR and "shutting down" in (chunks[-1].error or "")


async def test_reports_carry_the_times_of_every_phase(rig: Rig) -> None:
    await rig.tokens([5, 6], "narrow", max_tokens=5)
    [report] = rig.ear.reports
    assert (report.adapter, report.num_prompt_tokens, report.num_output_tokens) == ("narrow", 2, 5)
    assert report.queue_seconds is not None and report.ttft_seconds is not None
    assert 0 <= report.queue_seconds <= report.ttft_seconds <= report.e2e_seconds
    assert len(report.inter_token_seconds) == 4
    assert rig.ear.loads == ["host", "device"]


def test_callbacks_serve_threads_without_an_event_loop(base: BaseModel) -> None:
    engine = Engine(base, lambda digest: pytest.fail(digest), EngineConfig(kv_cache_bytes=8 << 20), Ear())
    engine.start()
    chunks: list[OutputChunk] = []
    done = threading.Event()

    def take(chunk: OutputChunk) -> None:
        chunks.append(chunk)
        if chunk.finish_reason is not None:
            done.set()

    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    engine.submit(GenerationRequest("r", (5, 6), sampling, "t"), take)
    assert done.wait(30)
    engine.shutdown(0)
    assert sum(len(c.token_ids) for c in chunks) == 5


@pytest.mark.slow
async def test_a_request_that_still_waits_at_its_deadline_ends_there(base: BaseModel) -> None:
    rig = Rig(base, max_num_seqs=1)
    long = asyncio.create_task(rig.tokens([5], max_tokens=400))
    while not rig.engine.stats().num_running:
        await asyncio.sleep(0)
    overdue = replace(rig.request([6]), timeout_seconds=0.01)
    [last] = [chunk async for chunk in rig.engine.generate(overdue)]
    assert (last.finish_reason, last.token_ids) == (FinishReason.TIMEOUT, ())
    assert len(await long) == 400, "nobody else is concerned"
    rig.engine.shutdown(0)


async def test_a_running_request_is_cut_at_its_deadline_and_frees_what_it_held(rig: Rig) -> None:
    await rig.tokens([5], "wide", max_tokens=1)
    overdue = replace(rig.request([5, 6], "wide", max_tokens=500), timeout_seconds=0.15)
    chunks = [chunk async for chunk in rig.engine.generate(overdue)]
    assert chunks[-1].finish_reason is FinishReason.TIMEOUT
    assert 0 < chunks[-1].num_output_tokens < 500
    await rig.tokens([5], max_tokens=1)
    assert (rig.engine.stats().num_running, rig.engine.stats().kv_usage) == (0, 0.0)


async def test_a_deadline_wakes_an_engine_that_waits_for_a_slow_adapter(base: BaseModel) -> None:
    arrived = threading.Event()
    rig = Rig(base)
    rig.load_hook = lambda name: arrived.wait(20)
    overdue = replace(rig.request([5], "wide"), timeout_seconds=0.05)
    [last] = [chunk async for chunk in rig.engine.generate(overdue)]
    assert last.finish_reason is FinishReason.TIMEOUT
    arrived.set()
    assert len(await rig.tokens([5], "wide")) == 16
    rig.engine.shutdown(0)


async def test_an_adapter_on_its_way_holds_up_no_other_and_no_load_holds_up_another(base: BaseModel) -> None:
    slow = threading.Event()
    rig = Rig(base)
    rig.load_hook = lambda name: slow.wait(20) if name == "wide" else None
    waiting = asyncio.create_task(rig.tokens([5], "wide"))
    while rig.engine.stats().waiting_adapters != ("wide",):
        await asyncio.sleep(0)
    assert len(await rig.tokens([5], "narrow")) == 16
    assert not waiting.done()
    slow.set()
    assert len(await waiting) == 16
    rig.engine.shutdown(0)


@pytest.mark.slow
async def test_the_next_adapters_are_fetched_while_every_seat_is_taken(base: BaseModel) -> None:
    rig = Rig(base, max_num_seqs=1, max_lora_slots=2)
    running = asyncio.create_task(rig.tokens([5], "narrow", max_tokens=400))
    while not rig.engine.stats().num_running:
        await asyncio.sleep(0)
    waiting = [asyncio.create_task(rig.tokens([5], name)) for name in ("wide", "head")]
    while "wide" not in rig.engine.stats().resident["device"] or "head" not in rig.engine.stats().resident["host"]:
        assert not running.done(), "the second slot takes the first in the queue while the first slot is in use"
        await asyncio.sleep(0)
    assert set(rig.engine.stats().resident["device"]) == {"narrow", "wide"}
    assert [len(tokens) for tokens in await asyncio.gather(running, *waiting)] == [400, 16, 16]
    rig.engine.shutdown(0)


@pytest.mark.slow
async def test_one_tenant_cannot_fill_the_queue_for_another(base: BaseModel) -> None:
    rig = Rig(base, max_waiting=8, max_num_seqs=1)
    flood = [rig.request([5], tenant="flood", max_tokens=300) for _ in range(12)]
    refused = 0
    for request in flood:
        try:
            rig.engine.submit(request, lambda chunk: None)
        except QueueFullError:
            refused += 1
    assert refused >= 12 - 1 - 4, "one may run already, four may wait"
    assert [len(await rig.tokens([5], tenant="newcomer", max_tokens=1)) for _ in range(2)] == [1, 1]
    rig.engine.shutdown(0)


@pytest.mark.slow
async def test_a_newcomer_pauses_a_flooders_answer_which_goes_on_unharmed(base: BaseModel) -> None:
    rig = Rig(base, max_num_seqs=2)
    alone = [await rig.tokens([7, 8, index], max_tokens=60) for index in range(2)]
    flood = [asyncio.create_task(rig.tokens([7, 8, i], tenant="flood", max_tokens=60)) for i in range(2)]
    while rig.engine.stats().num_running < 2:
        await asyncio.sleep(0)
    assert len(await rig.tokens([5, 6], tenant="newcomer", max_tokens=2)) == 2
    assert not all(task.done() for task in flood), "or it waited for a seat"
    assert await asyncio.gather(*flood) == alone
    assert rig.engine.stats().num_preemptions == 0
    rig.engine.shutdown(0)


async def test_a_seat_that_a_step_sets_free_is_taken_in_the_next(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of one token leave nobody running, and the engine slept for a second with a queue behind it."""
    monkeypatch.setattr("service.engine.intake.IDLE_POLL_SECONDS", 3600.0)
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(rig.tokens([7, 8, i], max_tokens=1) for i in range(40)))
    assert all(len(answer) == 1 for answer in answers)
