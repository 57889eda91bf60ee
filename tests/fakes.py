"""Stand-ins that implement the true interfaces, deterministically and at once. Nothing here loads torch."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from service.engine.errors import AdapterUnavailableError, EmbeddingFailedError, EngineError, RequestRejectedError
from service.engine.observation import EngineObserver, EngineStats
from service.engine.sequence import (
    FinishReason,
    GenerationRequest,
    OutputChunk,
    SequenceReport,
    TokenLogprob,
)

if TYPE_CHECKING:
    from adapters.lora_weights import BaseSignature


class FakeTokenizer:
    """A token is a character's code point; 0 ends an answer."""

    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]


@dataclass(frozen=True)
class FakeBase:
    """What the API needs of a base: its name, its limits and its tokenizer."""

    name: str = "tiny"
    fingerprint: str = "fingerprint-of-tiny"
    quantization: str = "none"
    max_model_len: int = 256
    vocab_size: int = 0x110000
    eos_token_ids: frozenset[int] = frozenset({0})
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    chat_template: str = "role:content, and nothing of tools"
    added_tokens: frozenset[str] = frozenset()
    activation_bytes: int = 4

    @property
    def identity(self) -> str:
        return self.fingerprint

    @property
    def signature(self) -> BaseSignature:
        """Two layers, which nothing computes."""
        from adapters.lora_weights import BaseSignature, LinearShape

        widths = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (8, 4), "mlp.down_proj": (16, 8)}
        shapes = {f"model.layers.{i}.{name}": LinearShape(*width) for i in range(2) for name, width in widths.items()}
        return BaseSignature(shapes, fingerprint=self.fingerprint)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        return self.tokenizer.encode("".join(f"{message['role']}:{message['content']}\n" for message in messages))


@dataclass
class FakeEngine:
    """Answers every prompt with `pieces`, one token each. Set the other fields to make it misbehave.

    `refusal` is raised before the first chunk; `fails_after` ends a sequence with an error after so many tokens;
    so do the answers of `failing_adapters`, before their first token;
    `endless` goes on until it is aborted; `first_step_blocked` never yields a first token.
    """

    pieces: tuple[str, ...] = ("Grüße", ",", " world", "!")
    refusal: EngineError | None = None
    fails_after: int | None = None
    failing_adapters: set[str] = field(default_factory=set)
    unavailable: dict[str, str] = field(default_factory=dict)  # adapters that cannot be loaded, and the error's code
    num_waiting: int = 3
    endless: bool = False
    first_step_blocked: bool = False
    cached: dict[str, int] = field(default_factory=dict)  # tokens by the index of the choice
    observer: EngineObserver | None = None
    base: FakeBase = field(default_factory=FakeBase)
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    embedding_size: int | None = 8
    most_running: int = 0
    num_running: int = 0
    alive: bool = True
    restarting: bool = False
    busy_since: float | None = None
    last_step_at: float | None = field(default_factory=time.monotonic)

    @property
    def num_open(self) -> int:
        return self.num_running

    @property
    def last_ended_at(self) -> float | None:
        return self.last_step_at

    async def embed(self, request: GenerationRequest) -> NDArray[np.float32]:
        """The tokens themselves, repeated to `embedding_size`, at length one."""
        assert request.pooling and self.embedding_size is not None
        chunks = self.generate(request)
        async with aclosing(chunks):
            async for chunk in chunks:
                if chunk.finish_reason is FinishReason.ERROR:
                    raise EmbeddingFailedError(f"The embedding could not be computed: {chunk.error}.")
        assert chunk.embedding is not None
        return chunk.embedding

    def submit(self, request: GenerationRequest, on_chunk: Callable[[OutputChunk], None]) -> None:
        """Pooling requests only: answered at once, in the caller's thread."""
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        on_chunk(self._chunk(request, "", 0, FinishReason.STOP))

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[OutputChunk, None]:
        if self.refusal is not None:
            raise self.refusal
        if (code := self.unavailable.get(request.adapter or "")) is not None:
            raise AdapterUnavailableError("it is damaged", code=code, digest=request.adapter or "", retry_after=None)
        if len(request.prompt_token_ids) > self.base.max_model_len - (not request.pooling):
            raise RequestRejectedError("too long", param="messages", code="context_length_exceeded")
        self.requests.append(request)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        finish_reason = FinishReason.ABORT
        num_tokens = 0
        try:
            deadline = time.monotonic() + (request.timeout_seconds or math.inf)
            while self.first_step_blocked and time.monotonic() < deadline:
                await asyncio.sleep(0.005)
            async for chunk in self._answer(request):
                if time.monotonic() >= deadline:
                    finish_reason = FinishReason.TIMEOUT
                    yield self._chunk(request, "", num_tokens, finish_reason, error="its time was up")
                    return
                num_tokens, finish_reason = chunk.num_output_tokens, chunk.finish_reason or finish_reason
                yield chunk
        finally:
            self.num_running -= 1
            self.last_step_at = time.monotonic()
            if finish_reason is FinishReason.ABORT:
                self.aborted.append(request.request_id)
            if self.observer is not None:
                self.observer.sequence_finished(_report(request, finish_reason, num_tokens))

    def retire(self, digest: str) -> None:
        self.retired.append(digest)

    def forget_tenant(self, tenant: str) -> None:
        self.forgotten.append(tenant)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            kv_usage=0.25,
            slots={"device": 32, "host": 256},
            resident={"device": ("a" * 64,), "host": ("a" * 64, "b" * 64)},
            waiting_adapters=("a" * 64, "c" * 64),
            num_pinned=0,
            num_steps=1,
            num_preemptions=0,
            last_step_at=self.last_step_at,
            busy_since=self.busy_since,
            num_restarts=2,
            restarting=self.restarting,
            alive=self.alive,
            error=None if self.alive else "the engine stopped: RuntimeError",
        )

    async def _answer(self, request: GenerationRequest) -> AsyncGenerator[OutputChunk, None]:
        if request.pooling:
            await asyncio.sleep(0)
            failed = self.fails_after is not None
            reason = FinishReason.ERROR if failed else FinishReason.STOP
            yield self._chunk(request, "", 0, reason, error="the adapter is damaged" if failed else None)
            return
        sampling, text = request.sampling, ""
        budget = sampling.max_tokens or self.base.max_model_len - len(request.prompt_token_ids)
        for number in range(budget):
            await asyncio.sleep(0.001 if self.endless else 0)
            if request.tenant in self.forgotten:
                yield self._chunk(request, "", number, FinishReason.ERROR, error="the tenant was deleted")
                return
            if number == self.fails_after or request.adapter in self.failing_adapters:
                yield self._chunk(request, "", number, FinishReason.ERROR, error="the adapter is damaged")
                return
            if number >= len(self.pieces) and not self.endless:
                yield self._chunk(request, "", number, FinishReason.STOP)
                return
            piece = self.pieces[number % len(self.pieces)]
            stop = next((stop for stop in sampling.stop if stop in text + piece), None)
            if stop is not None:
                kept = (text + piece).split(stop)[0][len(text) :]
                yield self._chunk(request, kept, number + 1, FinishReason.STOP)
                return
            text += piece
            last = FinishReason.LENGTH if number + 1 == budget else None
            yield self._chunk(request, piece, number + 1, last)
            if last is not None:
                return

    def _chunk(
        self,
        request: GenerationRequest,
        text: str,
        num_output_tokens: int,
        finish_reason: FinishReason | None = None,
        error: str | None = None,
    ) -> OutputChunk:
        num_top = request.sampling.logprobs
        return OutputChunk(
            text=text,
            token_ids=(num_output_tokens,),
            logprobs=None if num_top is None else (_logprob(text, num_top),) if text else (),
            finish_reason=finish_reason,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=num_output_tokens,
            error=error,
            num_cached_tokens=self.cached.get(request.request_id.rsplit("-", 1)[-1], 0),
            **({} if finish_reason is None or error else self._measured(request)),
        )

    def _measured(self, request: GenerationRequest) -> dict[str, Any]:
        """What a last chunk carries besides, where it was asked for."""
        if not request.pooling:
            return {"answer_nll": 0.5, "answer_entropy": 1.5} if request.measure else {}
        assert self.embedding_size is not None
        vector = np.resize(np.array(request.prompt_token_ids, dtype=np.float32), self.embedding_size)
        nll = 2.0 if request.measure and len(request.prompt_token_ids) > 1 else None
        return {"embedding": vector / np.linalg.norm(vector), "prompt_nll": nll}


def _logprob(text: str, num_top: int) -> TokenLogprob:
    others = [TokenLogprob(f"other{i}", 100 + i, -2.0 - i, (), ()) for i in range(num_top - 1)]
    chosen = TokenLogprob(text, 1, -0.5, tuple(text.encode()), ())
    top = (chosen, *others) if num_top else ()
    return TokenLogprob(chosen.token, chosen.token_id, chosen.logprob, chosen.bytes, top)


def _report(request: GenerationRequest, reason: FinishReason, num_tokens: int) -> SequenceReport:
    return SequenceReport(
        request_id=request.request_id,
        tenant=request.tenant,
        adapter=request.adapter,
        finish_reason=reason,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_output_tokens=num_tokens,
        queue_seconds=0.002,
        ttft_seconds=0.03,
        e2e_seconds=0.1,
        inter_token_seconds=(0.01,) * max(0, num_tokens - 1),
    )
