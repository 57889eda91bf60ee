"""Drives the engine with a batch of requests and says when each token came. Knows no HTTP and no peers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, count, pairwise

import torch

from adapters.errors import AdapterNotFoundError
from adapters.lora_weights import LoraWeights
from service.engine.base_model import BaseModel
from service.engine.engine import Engine
from service.engine.engine_config import EngineConfig
from service.engine.sequence import FinishReason, GenerationRequest, OutputChunk, SamplingParams, SequenceReport

_PATIENCE_SECONDS = 600.0
_SAME_STEP_SECONDS = 1e-4
"""Times are sums of differences: those of one step agree to microseconds only."""
_ids = count()


@dataclass(frozen=True)
class Row:
    """One request of a batch: its prompt and whose adapter it uses (None: the base alone)."""

    prompt: tuple[int, ...]
    adapter: str | None = None


@dataclass(frozen=True)
class Timeline:
    """When one batch was submitted, and when each of its tokens was there: [rows][tokens], in seconds."""

    submitted_at: float
    token_times: Sequence[Sequence[float]]

    @property
    def num_tokens(self) -> int:
        return sum(len(times) for times in self.token_times)

    @property
    def tokens_per_second(self) -> float:
        """From the first submission to the last token: prefill included."""
        return self.num_tokens / (max(times[-1] for times in self.token_times) - self.submitted_at)

    @property
    def decode_tokens_per_second(self) -> float:
        """While every row decodes: from the last row's first token to the first row's last."""
        start = max(times[0] for times in self.token_times)
        stop = min(times[-1] for times in self.token_times)
        return sum(start < t <= stop for times in self.token_times for t in times) / (stop - start)

    @property
    def step_seconds(self) -> list[float]:
        """Time between neighbouring decode steps, one value per step however many rows took part."""
        start = max(times[0] for times in self.token_times)
        stop = min(times[-1] for times in self.token_times)
        times = sorted(t for row in self.token_times for t in row if start <= t <= stop)
        return [b - a for a, b in pairwise(times) if b - a > _SAME_STEP_SECONDS]


class ServingRig:
    """An engine on a base, with adapters by name."""

    def __init__(self, base: BaseModel, adapters: Mapping[str, LoraWeights], *, max_num_seqs: int) -> None:
        self.adapters = adapters
        self._reports: dict[str, SequenceReport] = {}
        self.engine = Engine(
            base,
            self._load,
            EngineConfig(
                kv_cache_bytes=kv_bytes(base, max_num_seqs),
                max_num_seqs=max_num_seqs,
                max_lora_slots=max(1, len(adapters)),
                prefix_cache="off",  # the same prompts in every round
            ),
            self,
        )
        self.engine.start()

    def close(self) -> None:
        self.engine.shutdown(0)

    def run(self, rows: Sequence[Row], num_tokens: int, *, measure: bool = False) -> Timeline:
        """Submit all rows at once, decode exactly `num_tokens` for each, greedily, and wait for the last."""
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        ids = [f"bench-{next(_ids)}" for _ in rows]
        left = threading.Semaphore(0)
        failures: list[str] = []

        def hear(chunk: OutputChunk) -> None:
            if chunk.finish_reason is not None:
                if chunk.finish_reason is not FinishReason.LENGTH:
                    failures.append(chunk.error or chunk.finish_reason)
                left.release()

        arrivals = []
        for request_id, row in zip(ids, rows, strict=True):
            arrivals.append(time.monotonic())
            request = GenerationRequest(request_id, row.prompt, sampling, "bench", row.adapter, measure=measure)
            self.engine.submit(request, hear)
        for _ in rows:
            if not left.acquire(timeout=_PATIENCE_SECONDS):
                raise RuntimeError("the engine does not answer")
        if failures:
            raise RuntimeError(f"the engine failed: {failures[0]}")
        return Timeline(arrivals[0], [self._times(i, arrival) for i, arrival in zip(ids, arrivals, strict=True)])

    def _times(self, request_id: str, arrival: float) -> list[float]:
        while request_id not in self._reports:  # reported just after the last chunk
            time.sleep(0.0005)
        report = self._reports.pop(request_id)
        assert report.ttft_seconds is not None
        return list(accumulate(report.inter_token_seconds, initial=arrival + report.ttft_seconds))

    def _load(self, name: str) -> LoraWeights:
        if name not in self.adapters:
            raise AdapterNotFoundError(f"no adapter {name}")
        return self.adapters[name]

    # -- the engine's observer --------------------------------------------------------------------------------

    def sequence_finished(self, report: SequenceReport) -> None:
        self._reports[report.request_id] = report

    def adapter_loaded(self, tier: str, seconds: float) -> None:
        """Loading is over before anything is timed."""

    def adapter_evicted(self, reason: str) -> None:
        raise AssertionError("an adapter was evicted: the benchmark would time its loading")

    def adapter_verify_failed(self, reason: str) -> None:
        """The request that wanted it ends with an error, which `run` raises."""


@contextmanager
def serving(base: BaseModel, adapters: Mapping[str, LoraWeights], *, max_num_seqs: int) -> Iterator[ServingRig]:
    rig = ServingRig(base, adapters, max_num_seqs=max_num_seqs)
    try:
        yield rig
    finally:
        rig.close()


def random_prompts(vocabulary: int, num_rows: int, shortest: int, longest: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of random tokens, their lengths spread evenly."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [shortest + (longest - shortest) * i // max(1, num_rows - 1) for i in range(num_rows)]
    return [tuple(torch.randint(4, vocabulary, (n,), generator=generator).tolist()) for n in lengths]


def kv_bytes(base: BaseModel, max_num_seqs: int) -> int:
    """Room for every row at full length, so nothing is ever preempted."""
    config = base.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * base.dtype.itemsize
    return int(per_token * base.max_model_len * max_num_seqs)
