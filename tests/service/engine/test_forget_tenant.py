"""A deleted tenant in the engine: its answers end, nothing computed for it is found again, others notice nothing."""

from __future__ import annotations

import threading
from typing import Literal

import pytest

from service.engine.base_model import BaseModel
from service.engine.engine import Engine
from service.engine.engine_config import EngineConfig
from service.engine.sequence import FinishReason, GenerationRequest, OutputChunk, SamplingParams
from service.metrics import Metrics

PROMPT = tuple(range(5, 205))


class Answer:
    def __init__(self, engine: Engine, request_id: str, tenant: str, max_tokens: int = 2) -> None:
        self.chunks: list[OutputChunk] = []
        self.began, self.ended = threading.Event(), threading.Event()
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        engine.submit(GenerationRequest(request_id, PROMPT, sampling, tenant), self._take)

    def _take(self, chunk: OutputChunk) -> None:
        self.chunks.append(chunk)
        self.began.set()
        if chunk.finish_reason is not None:
            self.ended.set()

    def last(self) -> OutputChunk:
        assert self.ended.wait(60)
        return self.chunks[-1]


@pytest.mark.parametrize("prefix_cache", ["tenant", "shared"])
def test_answers_of_a_deleted_tenant_end_and_its_prompts_are_not_known_any_more(
    base: BaseModel, prefix_cache: Literal["tenant", "shared"]
) -> None:
    config = EngineConfig(kv_cache_bytes=32 << 20, prefix_cache=prefix_cache)
    engine = Engine(base, lambda digest: pytest.fail(digest), config, Metrics())
    engine.start()
    try:
        assert Answer(engine, "1", "spared").last().num_cached_tokens == 0
        of_two = Answer(engine, "2", "doomed").last().num_cached_tokens
        assert (of_two > 0) == (prefix_cache == "shared")  # only where tenants share is another's prompt known
        assert Answer(engine, "3", "doomed").last().num_cached_tokens > 0
        running = Answer(engine, "4", "doomed", max_tokens=base.max_model_len - len(PROMPT))
        beside = Answer(engine, "5", "spared", max_tokens=40)
        assert running.began.wait(60)
        engine.forget_tenant("doomed")
        assert (running.last().finish_reason, running.last().error) == (FinishReason.ERROR, "the tenant was deleted")
        assert beside.last().finish_reason is FinishReason.LENGTH
        late = Answer(engine, "6", "doomed").last()  # it was on its way
        assert (late.finish_reason, late.error) == (FinishReason.ERROR, "the tenant was deleted")
        prefixes = engine._machinery.residency.prefixes
        assert prefixes is not None and "doomed" not in prefixes.tenants()
        cached = Answer(engine, "7", "spared").last().num_cached_tokens
        assert (cached > 0) == (prefix_cache == "tenant")
    finally:
        engine.shutdown(0.0)
