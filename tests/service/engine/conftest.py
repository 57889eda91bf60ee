"""A real engine over the tiny random Llama, fp32, with random adapters by name instead of digest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.errors import AdapterNotFoundError
from adapters.lora_weights import LoraSpec, LoraWeights
from service.engine.base_model import BaseModel, load_base_model
from service.engine.engine import Engine
from service.engine.engine_config import EngineConfig
from service.engine.sequence import GenerationRequest, OutputChunk, SamplingParams, SequenceReport
from tests.adapters.loras import random_lora

SPECS = {
    "narrow": LoraSpec(r=4, lora_alpha=8),
    "wide": LoraSpec(r=20, lora_alpha=10, use_rslora=True),
    "attention": LoraSpec(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")),
    "head": LoraSpec(r=8, lora_alpha=16, target_modules=("lm_head", "down_proj")),
    "patterned": LoraSpec(r=8, lora_alpha=8, rank_pattern={"k_proj": 3}, alpha_pattern={"up_proj": 24.0}),
}


class Ear:
    """Remembers what the engine reported."""

    def __init__(self) -> None:
        self.reports: list[SequenceReport] = []
        self.evictions: list[str] = []
        self.loads: list[str] = []
        self.failures: list[str] = []

    def sequence_finished(self, report: SequenceReport) -> None:
        self.reports.append(report)

    def adapter_loaded(self, tier: str, seconds: float) -> None:
        self.loads.append(tier)

    def adapter_evicted(self, reason: str) -> None:
        self.evictions.append(reason)

    def adapter_verify_failed(self, reason: str) -> None:
        self.failures.append(reason)


class Rig:
    """An engine, its adapters by name, and short ways to ask it."""

    def __init__(self, base: BaseModel, **config: Any) -> None:
        self.base = base
        self.ear = Ear()
        self.adapters = {
            name: random_lora(base.signature, seed=seed, spec=spec) for seed, (name, spec) in enumerate(SPECS.items())
        }
        sizes = {"kv_cache_bytes": 8 << 20, "max_num_seqs": 12, "max_num_batched_tokens": 64, "prefill_chunk": 24}
        self.engine = Engine(base, self.load, EngineConfig(**{**sizes, "max_lora_slots": 4, **config}), self.ear)
        self.engine.start()
        self._count = 0
        self.load_hook: Callable[[str], object] = lambda name: None

    def load(self, name: str) -> LoraWeights:
        """In a loading thread, after whatever a test wants to happen there."""
        self.load_hook(name)
        if name not in self.adapters:
            raise AdapterNotFoundError(f"no adapter {name}")
        return self.adapters[name]

    def request(
        self,
        prompt: list[int],
        adapter: str | None = None,
        tenant: str = "t",
        pooling: bool = False,
        measure: bool = False,
        **sampling: Any,
    ) -> GenerationRequest:
        self._count += 1
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **sampling})
        name = f"r{self._count}"
        return GenerationRequest(name, tuple(prompt), params, tenant, adapter, pooling=pooling, measure=measure)

    async def ask(self, prompt: list[int], adapter: str | None = None, **asked: Any) -> list[OutputChunk]:
        return [chunk async for chunk in self.engine.generate(self.request(prompt, adapter, **asked))]

    async def tokens(self, prompt: list[int], adapter: str | None = None, **asked: Any) -> list[int]:
        return [token for chunk in await self.ask(prompt, adapter, **asked) for token in chunk.token_ids]

    async def embed(self, prompt: list[int], adapter: str | None = None, tenant: str = "t") -> NDArray[np.float32]:
        return await self.engine.embed(self.request(prompt, adapter, tenant, pooling=True))


@pytest.fixture(scope="session")
def base(tiny_llama_dir: Path) -> BaseModel:
    return load_base_model(str(tiny_llama_dir), quantization="none")


@pytest.fixture(scope="session")
def nf4_base(tiny_llama_dir: Path) -> BaseModel:
    return load_base_model(str(tiny_llama_dir), quantization="nf4")


@pytest.fixture
def rig(base: BaseModel) -> Iterator[Rig]:
    made = Rig(base)
    yield made
    made.engine.shutdown(0)
