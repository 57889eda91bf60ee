"""Clients that ask the engine one request after the other, each as soon as the one before is answered.

Knows the engine and its reports, not what is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from queue import SimpleQueue
from statistics import median, quantiles
from typing import Any

from adapters.lora_weights import LoraWeights
from bench.serving import Row, kv_bytes
from service.engine.base_model import BaseModel
from service.engine.engine import Engine
from service.engine.engine_config import EngineConfig
from service.engine.sequence import FinishReason, GenerationRequest, OutputChunk, SamplingParams, SequenceReport

_PATIENCE_SECONDS = 600.0
_ids = count()


@dataclass(frozen=True)
class Client:
    """Asks `rows` in turn, `num_tokens` each."""

    rows: Iterator[Row]
    num_tokens: int
    tenant: str = "bench"


@dataclass(frozen=True)
class Conversation:
    """What was reported: of the clients that were waited for, and of those in the background, cut off at the end."""

    seconds: float
    reports: Sequence[SequenceReport]
    background: Sequence[SequenceReport]

    @property
    def tokens_per_second(self) -> float:
        return sum(report.num_output_tokens for report in self.reports) / self.seconds

    @property
    def first_token_seconds(self) -> list[float]:
        return [report.ttft_seconds for report in self.reports if report.ttft_seconds is not None]

    @property
    def median_first_token_ms(self) -> float:
        return median(self.first_token_seconds) * 1e3

    @property
    def p99_first_token_ms(self) -> float:
        return p99(self.first_token_seconds) * 1e3


def p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98]


class TrafficRig:
    """An engine whose adapters come and go. Its observer."""

    def __init__(self, base: BaseModel, source: Callable[[str], LoraWeights], **sizes: Any) -> None:
        config = EngineConfig(
            kv_cache_bytes=kv_bytes(base, sizes.get("max_num_seqs", 32)),
            prefix_cache="off",  # few prompts for many requests: few adapters would find them computed, many not
        )
        self.engine = Engine(base, source, replace(config, **sizes), self)
        self.engine.start()
        self._reports: SimpleQueue[SequenceReport] = SimpleQueue()

    def converse(self, clients: Sequence[Client], background: Sequence[Client] = ()) -> Conversation:
        """Until every row of `clients` is answered; the background goes on all the while."""
        asking: dict[str, Client] = {}
        reports: tuple[list[SequenceReport], list[SequenceReport]] = ([], [])
        writing: SimpleQueue[str] = SimpleQueue()
        for client in background:
            self._ask(client, asking, writing)
        self._await_first_tokens(min(len(background), self.engine.config.max_num_seqs), writing)
        start = time.perf_counter()
        for client in clients:
            self._ask(client, asking)
        num_open = len(clients)
        while num_open:
            report = self._next_report()
            client = asking.pop(report.request_id)
            is_background = client in background
            reports[is_background].append(report)
            if not self._ask(client, asking) and not is_background:
                num_open -= 1
        seconds = time.perf_counter() - start
        for request_id in asking:
            self.engine.abort(request_id)
        reports[True].extend(self._next_report() for _ in asking)
        return Conversation(seconds, *reports)

    def close(self) -> None:
        self.engine.shutdown(0)

    def _ask(self, client: Client, asking: dict[str, Client], writing: SimpleQueue[str] | None = None) -> bool:
        """False when the client has no more questions. `writing` gets the id with every chunk of the answer."""
        row = next(client.rows, None)
        if row is None:
            return False
        request_id = f"traffic-{next(_ids)}"
        asking[request_id] = client

        def hear(chunk: OutputChunk) -> None:
            if writing is not None:
                writing.put(request_id)

        sampling = SamplingParams(temperature=0.0, max_tokens=client.num_tokens, ignore_eos=True)
        self.engine.submit(GenerationRequest(request_id, row.prompt, sampling, client.tenant, row.adapter), hear)
        return True

    def _await_first_tokens(self, num: int, writing: SimpleQueue[str]) -> None:
        """The background has computed its prompts and filled its seats before anything is timed."""
        seen: set[str] = set()
        while len(seen) < num:
            seen.add(writing.get(timeout=_PATIENCE_SECONDS))

    def _next_report(self) -> SequenceReport:
        report = self._reports.get(timeout=_PATIENCE_SECONDS)
        if report.finish_reason not in (FinishReason.LENGTH, FinishReason.ABORT):
            raise RuntimeError(f"the engine failed: {report.finish_reason}")
        return report

    # -- the engine's observer --------------------------------------------------------------------------------

    def sequence_finished(self, report: SequenceReport) -> None:
        self._reports.put(report)

    def adapter_loaded(self, tier: str, seconds: float) -> None:
        """Part of what is measured."""

    def adapter_evicted(self, reason: str) -> None:
        """Part of what is measured."""

    def adapter_verify_failed(self, reason: str) -> None:
        """The request that wanted it ends with an error, which `converse` raises."""

    def engine_restarted(self) -> None:
        raise AssertionError("the engine crashed")


@contextmanager
def traffic(base: BaseModel, source: Callable[[str], LoraWeights], **sizes: Any) -> Iterator[TrafficRig]:
    rig = TrafficRig(base, source, **sizes)
    try:
        yield rig
    finally:
        rig.close()
