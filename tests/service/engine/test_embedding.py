"""Embeddings: the mean of plain transformers' hidden states, the same alone and in any crowd, never a sampled token."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from adapters.peft_format import write_adapter
from service.engine.base_model import BaseModel, load_base_model
from service.engine.engine import Engine
from service.engine.engine_config import EngineConfig
from service.engine.errors import AdapterUnavailableError, RequestRejectedError
from service.engine.pooling import watching
from service.engine.sequence import FinishReason, GenerationRequest, SamplingParams
from tests.service.engine.conftest import SPECS, Ear, Rig
from tests.service.engine.test_base_model import FAMILIES, save_random

pytestmark = pytest.mark.anyio

LENGTHS = (1, 2, 3, 23, 24, 25, 48, 90)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def prompt(length: int, vocabulary: int = 500) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(5, vocabulary) for _ in range(length)]


def reference(model: torch.nn.Module, tokens: list[int]) -> NDArray[np.float32]:
    """The slow way: the whole prompt at once, every hidden state kept."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
    mean = states.double().mean(dim=0)
    vector: NDArray[np.float32] = (mean / mean.norm()).float().numpy()
    return vector


async def test_an_embedding_is_the_normalised_mean_of_the_last_hidden_states(rig: Rig, tiny_llama_dir: Path) -> None:
    plain = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    for length in (*LENGTHS, 512):
        vector = await rig.embed(prompt(length))
        assert vector.shape == (rig.engine.embedding_size,) == (128,) and vector.dtype == np.float32
        np.testing.assert_allclose(vector, reference(plain, prompt(length)), atol=2e-6)


async def test_an_adapters_embedding_is_that_of_plain_peft(rig: Rig, tiny_llama_dir: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path, rig.adapters["wide"], base_name=str(tiny_llama_dir), base=rig.base.signature)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama_dir), str(tmp_path))
    for length in LENGTHS:
        vector = await rig.embed(prompt(length), "wide")
        np.testing.assert_allclose(vector, reference(model, prompt(length)), atol=1e-5)
    assert not np.allclose(vector, await rig.embed(prompt(length)), atol=1e-3), "the adapter must make a difference"


@pytest.mark.parametrize("family", list(FAMILIES))
async def test_every_family_shows_its_hidden_states(family: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    kind, values, *_ = FAMILIES[family]
    directory = save_random(kind, values, tiny_llama_dir, tmp_path)
    base = load_base_model(str(directory), quantization="none")
    config = EngineConfig(kv_cache_bytes=8 << 20, prefill_chunk=24)
    engine = Engine(base, lambda digest: pytest.fail(digest), config, Ear())
    engine.start()
    vector = await engine.embed(GenerationRequest("r", tuple(prompt(60)), SamplingParams(), "t", pooling=True))
    engine.shutdown(0)
    plain = AutoModelForCausalLM.from_pretrained(directory)
    np.testing.assert_allclose(vector, reference(plain, prompt(60)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
async def test_an_embedding_is_the_same_alone_and_in_a_crowd_bit_for_bit(
    quantization: str, base: BaseModel, nf4_base: BaseModel
) -> None:
    rig = Rig(base if quantization == "none" else nf4_base)
    await rig.tokens([5], "wide")  # slot tables are as wide as the widest adapter so far, and zeros move float32 bits
    rng = random.Random(3)
    asked = [(prompt(length), rng.choice([None, *SPECS])) for length in LENGTHS * 2]
    alone = [await rig.embed(p, a) for p, a in asked]
    said = [await rig.tokens(p, a) for p, a in asked]
    crowd, talk = await asyncio.gather(
        asyncio.gather(*(rig.embed(p, a) for p, a in asked)), asyncio.gather(*(rig.tokens(p, a) for p, a in asked))
    )
    rig.engine.shutdown(0)
    assert [v.tobytes() for v in crowd] == [v.tobytes() for v in alone]
    assert talk == said


async def test_a_preempted_embedding_starts_its_sum_again(base: BaseModel) -> None:
    rig = Rig(base, kv_cache_bytes=3 * 512 * base.model.config.num_hidden_layers * 2 * 2 * 32 * 4)
    alone = await rig.embed(prompt(400))
    _, _, first, second = await asyncio.gather(
        rig.tokens(prompt(85), max_tokens=40),  # these two outgrow their rows, and the cache is full
        rig.tokens(prompt(85), max_tokens=40),
        rig.embed(prompt(400)),
        rig.embed(prompt(400)),
    )
    preempted = rig.engine.stats().num_preemptions
    rig.engine.shutdown(0)
    assert preempted > 0, "the budget must be too small for all, or this test shows nothing"
    assert first.tobytes() == second.tobytes() == alone.tobytes()


async def test_an_embedding_generates_nothing_and_leaves_nothing_behind(rig: Rig) -> None:
    chunks = [chunk async for chunk in rig.engine.generate(rig.request(prompt(60), "wide", pooling=True))]
    [chunk] = chunks
    assert (chunk.finish_reason, chunk.text, chunk.token_ids) == (FinishReason.STOP, "", ())
    assert (chunk.num_prompt_tokens, chunk.num_output_tokens) == (60, 0) and chunk.embedding is not None
    await rig.tokens([5], max_tokens=1)  # the engine's own check of what is held runs when it is idle
    [report, _] = rig.ear.reports
    assert (report.num_prompt_tokens, report.num_output_tokens, report.ttft_seconds) == (60, 0, None)
    assert rig.engine.stats().kv_usage == 0 and rig.engine._machinery.residency.slots.references() == {}


async def test_a_cancelled_embedding_is_aborted(rig: Rig) -> None:
    task = asyncio.create_task(rig.embed(prompt(500)))
    while not rig.engine.stats().num_running:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await rig.tokens([5], max_tokens=1)
    assert rig.engine.stats().kv_usage == 0
    assert rig.ear.reports[0].finish_reason is FinishReason.ABORT


async def test_prompts_that_cannot_be_embedded_are_refused(rig: Rig) -> None:
    for tokens, code in (([], "invalid_prompt"), ([5] * 513, "context_length_exceeded"), ([512], "invalid_prompt")):
        with pytest.raises(RequestRejectedError) as rejection:
            await rig.embed(tokens)
        assert rejection.value.code == code
    with pytest.raises(AdapterUnavailableError, match="no adapter deleted"):
        await rig.embed([5], "deleted")


def test_a_forward_of_another_thread_is_not_watched(base: BaseModel) -> None:
    tokens = torch.tensor([[5, 6, 7]])

    def seen_while(forward: Callable[[], object]) -> torch.Size | None:
        with torch.inference_mode(), watching() as seen:
            forward()
        return None if seen.last is None else seen.last.shape

    def elsewhere() -> None:
        other = threading.Thread(target=lambda: base.model(input_ids=tokens, use_cache=False))
        other.start()
        other.join()

    assert seen_while(elsewhere) is None
    assert seen_while(lambda: base.model(input_ids=tokens, use_cache=False)) == (3, 128)
