"""What the engine measures for drift, against a log_softmax over plain transformers' logits, alone and in a crowd."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from adapters.peft_format import write_adapter
from service.engine.base_model import BaseModel, load_base_model
from service.engine.engine import Engine
from service.engine.engine_config import EngineConfig
from service.engine.errors import RequestRejectedError
from service.engine.pooling import watch_hidden_states
from service.engine.prompt_nll import POSITIONS, prompt_nll
from service.engine.sequence import GenerationRequest, OutputChunk
from service.engine.token_measures import token_measures, torch_measures
from tests.service.engine.conftest import Ear, Rig
from tests.service.engine.test_base_model import FAMILIES, save_random
from tests.service.engine.test_embedding import prompt

pytestmark = pytest.mark.anyio

LENGTHS = (2, 3, 23, 24, 25, 48, 90)
MIXES = (None, "wide", "head", None, "narrow", "wide", "attention")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def plain(tiny_llama_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama_dir)


def log_p(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Of every token at every position: float64 [len(tokens), vocabulary]."""
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0].double(), dim=-1)


def surprise(model: torch.nn.Module, tokens: list[int]) -> float:
    found = log_p(model, tokens)
    return -float(np.mean([float(found[at - 1, tokens[at]]) for at in range(1, len(tokens))]))


def answered(model: torch.nn.Module, asked: list[int], answer: list[int]) -> tuple[float, float]:
    """Mean -log p and mean entropy over an answer."""
    found = log_p(model, asked + answer)[len(asked) - 1 : -1]
    own = -found[range(len(answer)), answer]
    return float(own.mean()), float(-(found.exp() * found).sum(dim=-1).mean())


async def probe(engine: Engine, tokens: list[int], name: str = "probe") -> OutputChunk:
    request = GenerationRequest.probe(name, tuple(tokens), "t/drift", priority=-100)
    [chunk] = [chunk async for chunk in engine.generate(request)]
    return chunk


async def test_a_probe_tells_the_mean_surprise_of_a_prompt_and_its_embedding(rig: Rig, plain: LlamaForCausalLM) -> None:
    for length in (*LENGTHS, 2 * POSITIONS + 1, 512):
        chunk = await probe(rig.engine, prompt(length), f"probe-{length}")
        assert chunk.prompt_nll == pytest.approx(surprise(plain, prompt(length)), rel=1e-5)
        assert chunk.embedding is not None
        assert chunk.embedding.tobytes() == (await rig.embed(prompt(length))).tobytes()
        assert (chunk.answer_nll, chunk.answer_entropy) == (None, None)


async def test_a_prompt_of_one_token_has_an_embedding_and_nothing_to_be_surprised_at(rig: Rig) -> None:
    chunk = await probe(rig.engine, [7])
    assert chunk.prompt_nll is None and chunk.embedding is not None


async def test_an_embedding_that_is_no_probe_is_not_measured(rig: Rig) -> None:
    [chunk] = await rig.ask(prompt(30), pooling=True)
    assert chunk.prompt_nll is None and chunk.embedding is not None


async def test_a_probe_asks_the_base_alone(rig: Rig) -> None:
    with pytest.raises(RequestRejectedError, match="base alone"):
        await rig.ask(prompt(30), "wide", pooling=True, measure=True)


@pytest.mark.parametrize("family", list(FAMILIES))
async def test_every_familys_logits_are_those_of_its_own_forward(
    family: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Gemma 2 caps them behind the head."""
    kind, values, *_ = FAMILIES[family]
    directory = save_random(kind, values, tiny_llama_dir, tmp_path)
    base = load_base_model(str(directory), quantization="none")
    engine = Engine(base, lambda digest: pytest.fail(digest), EngineConfig(kv_cache_bytes=8 << 20), Ear())
    engine.start()
    chunk = await probe(engine, prompt(60))
    engine.shutdown(0)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert chunk.prompt_nll == pytest.approx(surprise(model, prompt(60)), rel=1e-4)


async def test_a_quantized_bases_surprise_is_near_that_of_its_own_whole_forward(nf4_base: BaseModel) -> None:
    rig = Rig(nf4_base)
    chunk = await probe(rig.engine, prompt(90))
    rig.engine.shutdown(0)
    assert chunk.prompt_nll == pytest.approx(surprise(nf4_base.model, prompt(90)), rel=5e-3)


def test_a_base_whose_logits_come_from_elsewhere_is_not_measured(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch_hidden_states(base)
    assert prompt_nll(base) is not None
    original = base.model.forward

    def forward(**given: Any) -> Any:
        output = original(**given)
        if given.get("input_ids") is not None:
            output.logits = output.logits * 3.0
        return output

    monkeypatch.setattr(base.model, "forward", forward)
    assert prompt_nll(base) is None


@pytest.mark.parametrize("quantization", ["none", "nf4"])
async def test_a_probe_is_the_same_alone_and_in_a_crowd_bit_for_bit(
    quantization: str, base: BaseModel, nf4_base: BaseModel
) -> None:
    rig = Rig(base if quantization == "none" else nf4_base)
    await rig.tokens([5], "wide")
    lengths = (*LENGTHS, 100, 130)
    alone = [await probe(rig.engine, prompt(length), f"alone-{length}") for length in lengths]
    crowd, _ = await asyncio.gather(
        asyncio.gather(*(probe(rig.engine, prompt(length), f"crowd-{length}") for length in lengths)),
        asyncio.gather(*(rig.tokens(prompt(length), name) for length, name in zip(LENGTHS, MIXES, strict=True))),
    )
    rig.engine.shutdown(0)
    assert [chunk.prompt_nll for chunk in crowd] == [chunk.prompt_nll for chunk in alone]


async def test_a_preempted_probe_starts_its_sum_again(base: BaseModel) -> None:
    rig = Rig(base, kv_cache_bytes=3 * 512 * base.model.config.num_hidden_layers * 2 * 2 * 32 * 4)
    alone = await probe(rig.engine, prompt(400))
    _, _, first, second = await asyncio.gather(
        rig.tokens(prompt(85), max_tokens=40),
        rig.tokens(prompt(85), max_tokens=40),
        probe(rig.engine, prompt(400), "first"),
        probe(rig.engine, prompt(400), "second"),
    )
    preempted = rig.engine.stats().num_preemptions
    rig.engine.shutdown(0)
    assert preempted > 0, "the budget must be too small for all, or this test shows nothing"
    assert first.prompt_nll == second.prompt_nll == alone.prompt_nll is not None


async def test_answers_are_measured_by_the_model_that_gave_them_whatever_the_sampling(
    rig: Rig, plain: LlamaForCausalLM, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    samplings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.4, "top_p": 0.9, "seed": 5},
        {"temperature": 0.7, "presence_penalty": 1.5, "repetition_penalty": 1.3, "seed": 6},
        {"logit_bias": ((300, 40.0),)},
    ]
    models: dict[str | None, torch.nn.Module] = {None: plain}
    write_adapter(tmp_path, rig.adapters["wide"], base_name=str(tiny_llama_dir), base=rig.base.signature)
    models["wide"] = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama_dir), str(tmp_path))
    asked = [(prompt(10 + i), name, sampling) for i, sampling in enumerate(samplings) for name in models]
    answers = await asyncio.gather(*(rig.ask(p, name, measure=True, **s) for p, name, s in asked))
    for (tokens, name, _), chunks in zip(asked, answers, strict=True):
        answer = [token for chunk in chunks for token in chunk.token_ids]
        nll, entropy = answered(models[name], tokens, answer)
        assert (chunks[-1].answer_nll, chunks[-1].answer_entropy) == pytest.approx((nll, entropy), rel=1e-4)
        assert all(chunk.answer_nll is None for chunk in chunks[:-1])
        report = next(r for r in rig.ear.reports if r.num_prompt_tokens == len(tokens) and r.adapter == name)
        assert (report.answer_nll, report.answer_entropy) == (chunks[-1].answer_nll, chunks[-1].answer_entropy)


async def test_nothing_is_measured_that_was_not_asked_for(rig: Rig) -> None:
    measured, other = await asyncio.gather(rig.ask(prompt(9), measure=True), rig.ask(prompt(11)))
    assert measured[-1].answer_nll is not None
    assert (other[-1].answer_nll, other[-1].answer_entropy) == (None, None)


async def test_measuring_changes_no_token(rig: Rig) -> None:
    samplings: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}]
    for sampling in samplings:
        assert await rig.tokens(prompt(9), measure=True, **sampling) == await rig.tokens(prompt(9), **sampling)


async def test_the_token_that_ends_an_answer_is_measured_too(rig: Rig, plain: LlamaForCausalLM) -> None:
    [end] = rig.base.eos_token_ids
    chunks = await rig.ask(prompt(9), measure=True, ignore_eos=False, logit_bias=((end, 100.0),))
    assert [token for chunk in chunks for token in chunk.token_ids] == [end]
    assert (chunks[-1].answer_nll, chunks[-1].answer_entropy) == pytest.approx(answered(plain, prompt(9), [end]))


async def test_what_is_replayed_after_a_preemption_is_not_counted_twice(
    base: BaseModel, plain: LlamaForCausalLM
) -> None:
    rig = Rig(base, kv_cache_bytes=3 * 512 * base.model.config.num_hidden_layers * 2 * 2 * 32 * 4)
    asked = [prompt(85), prompt(84), prompt(400), prompt(401)]
    answers = await asyncio.gather(*(rig.ask(tokens, measure=True, max_tokens=40) for tokens in asked))
    preempted = rig.engine.stats().num_preemptions
    rig.engine.shutdown(0)
    assert preempted > 0, "the budget must be too small for all, or this test shows nothing"
    for tokens, chunks in zip(asked, answers, strict=True):
        answer = [token for chunk in chunks for token in chunk.token_ids]
        found = (chunks[-1].answer_nll, chunks[-1].answer_entropy)
        assert found == pytest.approx(answered(plain, tokens, answer), rel=1e-4)


def test_both_ways_to_measure_tokens_give_what_log_softmax_gives() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 1000, generator=generator) * torch.tensor([0.0, 0.1, 1, 3, 10, 40, 3])[:, None]
    logits[6, ::3] = float("-inf")
    chosen = torch.tensor([random.Random(2).randrange(1000) // 3 * 3 + 1 for _ in range(7)])
    log_p = torch.log_softmax(logits.double(), dim=-1)
    entropy = -torch.where(log_p.isinf(), 0, log_p.exp() * log_p).sum(dim=-1)
    expected = torch.stack((-log_p.gather(1, chosen[:, None]).squeeze(1).clamp(min=-87), entropy), dim=1)
    for found in (torch.tensor(token_measures(logits, chosen)), torch_measures(logits, chosen).T):
        np.testing.assert_allclose(found[:5], expected[:5], rtol=1e-5, atol=3e-6)
        np.testing.assert_allclose(found[6], expected[6], rtol=1e-5)
        assert torch.isfinite(found).all()


def test_a_rows_measures_do_not_depend_on_the_other_rows() -> None:
    logits = torch.randn(33, 777, generator=torch.Generator().manual_seed(4))
    chosen = logits.argmax(dim=-1)
    together = token_measures(logits, chosen)
    assert together == [token_measures(logits[i : i + 1], chosen[i : i + 1])[0] for i in range(33)]
