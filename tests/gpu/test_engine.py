"""The engine on a device: recorded steps against eager ones, crowds against single requests, beside the CPU."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service.engine.base_model import BaseModel, load_base_model
from tests.service.engine.conftest import Rig

pytestmark = [pytest.mark.gpu, pytest.mark.anyio]
ADAPTERS = ["narrow", None, "wide", "narrow", "patterned", None, "attention", "head", "wide"]
QUESTIONS = [([5 + i, 9, 11 + i] * (1 + 4 * (i % 3)), adapter) for i, adapter in enumerate(ADAPTERS)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def cpu_base(tiny_llama_dir: Path) -> BaseModel:
    return load_base_model(str(tiny_llama_dir), quantization="none", device="cpu")


@pytest.fixture(scope="module")
def cuda_base(tiny_llama_dir: Path) -> BaseModel:
    return load_base_model(str(tiny_llama_dir), quantization="none", device="cuda", dtype=torch.float32)


@pytest.fixture(scope="module")
def cuda_nf4_base(tiny_llama_dir: Path) -> BaseModel:
    return load_base_model(str(tiny_llama_dir), quantization="nf4", device="cuda")


class Rigs:
    """Engines that end with the test."""

    def __init__(self) -> None:
        self.made: list[Rig] = []

    def __call__(self, base: BaseModel, cuda_graphs: bool = True) -> Rig:
        self.made.append(Rig(base, cuda_graphs=cuda_graphs))
        return self.made[-1]


@pytest.fixture
def rigs() -> Iterator[Rigs]:
    made = Rigs()
    yield made
    for rig in made.made:
        rig.engine.shutdown(0)


async def crowd(rig: Rig) -> list[list[int]]:
    return list(await asyncio.gather(*(rig.tokens(prompt, adapter) for prompt, adapter in QUESTIONS)))


async def test_recorded_steps_give_the_tokens_of_eager_ones_and_of_the_cpu(
    cuda_base: BaseModel, cpu_base: BaseModel, rigs: Rigs, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = await crowd(rigs(cuda_base))
    assert not [r for r in caplog.records if r.message in ("engine.graphs_disabled", "engine.no_triton")]
    assert recorded == await crowd(rigs(cuda_base, cuda_graphs=False))
    assert recorded == await crowd(rigs(cpu_base))


async def test_an_answer_is_the_same_alone_and_in_a_crowd(cuda_base: BaseModel, rigs: Rigs) -> None:
    """In float32, where the device's own products differ by the batch too little to matter."""
    rig = rigs(cuda_base)
    together = await crowd(rig)
    assert [await rig.tokens(prompt, adapter) for prompt, adapter in QUESTIONS] == together


async def test_nf4_answers_mostly_agree_alone_in_a_crowd_and_eagerly(cuda_nf4_base: BaseModel, rigs: Rigs) -> None:
    """bitsandbytes picks its kernel by the number of rows, so here the bits may differ: the rate is what counts."""
    rig = rigs(cuda_nf4_base)
    together = await crowd(rig)
    alone = [await rig.tokens(prompt, adapter) for prompt, adapter in QUESTIONS]
    eager = await crowd(rigs(cuda_nf4_base, cuda_graphs=False))
    rates = {
        name: sum(a == b for a, b in zip(together, others, strict=True)) / len(QUESTIONS)
        for name, others in (("alone", alone), ("eager", eager))
    }
    print("equal answers:", rates)
    assert min(rates.values()) >= 0.5
    assert all(len(answer) == 16 for answer in together)


async def test_steps_are_recorded_while_another_thread_computes_and_allocates(cuda_base: BaseModel, rigs: Rigs) -> None:
    """As training does: on its own stream, with gradients, and with memory that comes and goes."""
    expected = await crowd(rigs(cuda_base, cuda_graphs=False))
    stop, rounds, failures = threading.Event(), [0], list[BaseException]()

    def train() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not stop.is_set():
                    weight = torch.ones(256 + rounds[0] % 64, 256, device="cuda", requires_grad=True)
                    (weight @ weight.T).sum().backward()
                    rounds[0] += 1
                    if rounds[0] % 50 == 0:
                        torch.cuda.empty_cache()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        assert await crowd(rigs(cuda_base)) == expected
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert rounds[0] > 0
