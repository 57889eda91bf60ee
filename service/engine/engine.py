"""The loop: schedule, run, post-process. Requests come in by messages, text goes out by callbacks.

One thread owns sequences, cache, slots and the forward; nothing else touches them. Knows no HTTP and no metrics
library: an `EngineObserver` hears of finished sequences.

A fault is met where it does least harm: in one answer's text it ends that answer, in a step the step's requests.
What escapes from there is a crash: whoever had started gets an error, cache, slots and scheduler are made anew
around the base that stays loaded, and the loop goes on after a forward has succeeded. Too many crashes within a
minute, or a lost device, end the engine for good.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.errors import AdapterError
from adapters.host_cache import HostCache
from adapters.peft_format import LoraWeights
from adapters.prepared import PreparedAdapter, prepare
from adapters.slots import AdapterSlots
from service.engine.base_model import BaseModel
from service.engine.crash_limit import CrashLimit
from service.engine.detokenizer import TokenBytes
from service.engine.errors import EmbeddingFailedError, EngineDeadError, QueueFullError, RequestRejectedError
from service.engine.kernel_forward import kernel_forward
from service.engine.kv_cache import KvCache, block_tokens
from service.engine.observation import EngineObserver, EngineStats
from service.engine.pooling import embedding, watch_hidden_states
from service.engine.prefix_cache import PrefixCache
from service.engine.residency import Residency
from service.engine.response import Response
from service.engine.runner import Runner, probe_layers
from service.engine.sampler import Sampled
from service.engine.scheduler import Admission, Plan, Scheduler, Work
from service.engine.sequence import (
    FinishReason,
    GenerationRequest,
    OutputChunk,
    SamplingParams,
    Sequence,
    SequenceStatus,
)

logger = logging.getLogger(__name__)

_IDLE_POLL_SECONDS = 1.0
MAX_CRASHES, CRASH_WINDOW_SECONDS = 3, 60.0
_SELF_CHECK = GenerationRequest("_self_check", (0,), SamplingParams(max_tokens=1, temperature=0.0), "_self_check")


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine; `service.config.Settings` documents each."""

    kv_cache_bytes: int
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    prefill_chunk: int = 128
    max_lora_slots: int = 32
    max_lora_rank: int = 64
    max_host_adapters: int = 256
    host_adapter_bytes: int = 4 << 30
    max_waiting: int = 1024
    cuda_graphs: bool = True
    prefix_cache: Literal["tenant", "shared", "off"] = "tenant"


@dataclass(frozen=True)
class _Submit:
    sequence: Sequence
    response: Response


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _Retire:
    digest: str


_Command = _Submit | _Abort | _Retire


class Engine:
    """Continuous batching over one base and many adapters."""

    def __init__(
        self,
        base: BaseModel,
        source: Callable[[str], LoraWeights],
        config: EngineConfig,
        observer: EngineObserver,
    ) -> None:
        self.base = base
        self.config = config
        self._observer = observer
        self._host = HostCache(
            _preparing(source, base),
            capacity=config.max_host_adapters,
            max_bytes=config.host_adapter_bytes,
            observer=observer,
            on_ready=self._wake,
        )
        self.embedding_size = watch_hidden_states(base)
        self._build()
        self._crashes = CrashLimit(MAX_CRASHES, CRASH_WINDOW_SECONDS)
        self._restarting = False
        self._num_restarts = 0
        self._token_bytes = TokenBytes(base.tokenizer)
        self._responses: dict[str, _Submit] = {}
        self._seeds: dict[Sequence, int] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap; requests that have ended leave it in their time
        self._condition = threading.Condition()
        self._inbox: deque[_Command] = deque()
        self._arriving: Counter[str] = Counter()
        """Submissions in the inbox, by tenant."""
        self._woken = False
        self._draining = False
        self._stop = False
        self._error: str | None = None
        self._steps = self._preemptions = self._num_loads = 0
        self._last_step_at: float | None = None
        self._busy_since: float | None = None
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[OutputChunk], OutputChunk]]] = {}
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._stats = self._picture()

    # -- what other threads call ------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def shutdown(self, drain_seconds: float) -> None:
        """Take nothing new, let running answers finish for `drain_seconds`, end the rest with an error."""
        with self._condition:
            self._draining = True
            deadline = time.monotonic() + drain_seconds
            while self._thread.is_alive() and (self._inbox or self._responses):
                left = deadline - time.monotonic()
                if left <= 0 or (
                    not self._condition.wait(min(left, _IDLE_POLL_SECONDS)) and time.monotonic() > deadline
                ):
                    break
            self._stop = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._host.close()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[OutputChunk]:
        """Stream one answer. Closing the iterator aborts the sequence.

        Raises (before the first chunk):
            RequestRejectedError: the request can never run.
            QueueFullError: `max_waiting` requests wait already.
            EngineDeadError: the engine is stopping or has stopped.
        """
        queue: asyncio.Queue[OutputChunk] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self.submit(request, lambda chunk: self._outbox.setdefault(loop, []).append((queue, chunk)))
        finished = False
        try:
            while not finished:
                chunk = await queue.get()
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            if not finished:
                self.abort(request.request_id)

    async def embed(self, request: GenerationRequest) -> NDArray[np.float32]:
        """The embedding of a prompt, [embedding_size]: the base's own or, with `adapter`, the adapter's.

        The request is one with `pooling`. Cancelling aborts the sequence. Raises as `generate` does, and
        EmbeddingFailedError when the engine gives up on it later.
        """
        assert request.pooling, "generate() answers this one"
        async with aclosing(self.generate(request)) as chunks:
            chunk = await anext(chunks)
        if chunk.embedding is None:
            raise EmbeddingFailedError(f"The embedding could not be computed: {chunk.error or 'it was aborted'}.")
        return chunk.embedding

    def submit(self, request: GenerationRequest, on_chunk: Callable[[OutputChunk], None]) -> None:
        """Queue a request; `on_chunk` is called in the engine's thread. Raises as `generate` does."""
        sequence = Sequence(request, self._max_tokens(request))
        response = Response(request, self.base, self._token_bytes, on_chunk)
        with self._condition:
            if self._draining or self._stop:
                raise EngineDeadError(self._error or "the service is shutting down")
            self._check_room(request.tenant)
            self._inbox.append(_Submit(sequence, response))
            self._arriving[request.tenant] += 1
            self._condition.notify_all()

    def abort(self, request_id: str) -> None:
        """End a request whose client has gone. Unknown or finished ids are no error: the end may be on its way."""
        self._post(_Abort(request_id))

    def retire(self, digest: str) -> None:
        """A deleted adapter: running sequences finish on it, then its slot is free."""
        self._post(_Retire(digest))

    def stats(self) -> EngineStats:
        """The picture after the last step; only `busy_since` is of now, so that a step that hangs can be seen."""
        return replace(self._stats, busy_since=self._busy_since)

    # -- the engine's thread ----------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            with _decoding_stream(self.base.device):
                while not self._serve():
                    pass
        except BaseException as error:
            self._error = f"the engine stopped: {type(error).__name__}"
            logger.exception("engine.died")
        finally:
            self._end()

    def _serve(self) -> bool:
        """Step after step. True when it is time to end, False after a crash that the engine can come back from."""
        try:
            if self._restarting:
                self._restart()
            while self._wait_for_work():
                self._take_commands()
                self._end_overdue()
                self._step()
                self._deliver()
        except BaseException:
            if self._crashes.exceeded_by_another() or _is_lost(self.base.device):
                raise
            logger.exception("engine.crashed")
            self._restarting = True
            self._busy_since = time.monotonic()
            self._stats = replace(self._stats, restarting=True)
            self._abandon("the engine failed and is restarting", keep_waiting=True)
            self._deliver()
            return False
        return True

    def _restart(self) -> None:
        """Everything anew but the base and the adapters in host memory. Over when a forward has succeeded."""
        self._residency.close()
        self._build()
        self._self_check()
        self._restarting, self._busy_since = False, None
        self._num_restarts += 1
        for submitted in self._responses.values():
            self._scheduler.add(submitted.sequence)
        self._stats = self._picture()
        logger.warning("engine.restarted", extra={"num_restarts": self._num_restarts})
        self._wake()

    def _build(self) -> None:
        """What a crash may have left broken: cache, slots, scheduler, runner."""
        base, config = self.base, self.config
        cache = KvCache(
            probe_layers(base),
            max_bytes=config.kv_cache_bytes,
            max_model_len=base.max_model_len,
            dtype=base.dtype,
            device=base.device,
            block=block_tokens(config.prefill_chunk),
        )
        slots = AdapterSlots(
            base.lora_sites.values(),
            num_slots=config.max_lora_slots,
            max_rank=config.max_lora_rank,
            dtype=base.dtype,
            device=base.device,
            host=self._host,
            observer=self._observer,
        )
        shared = config.prefix_cache == "shared"
        prefixes = None if config.prefix_cache == "off" else PrefixCache(cache, shared=shared)
        self._residency = Residency(cache, slots, prefixes)
        self._scheduler = Scheduler(
            self._residency,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefill_chunk=config.prefill_chunk,
            on_preempt=self._count_preemption,
        )
        self._prefetched_at = (0, 0)
        kernels = kernel_forward(base, self._residency, config.max_num_seqs, config.cuda_graphs)
        self._runner = Runner(base, self._residency, kernels)

    def _end(self) -> None:
        """Nothing will run any more: tell everybody, whatever state the rest is in."""
        with self._condition:
            self._stop = True
            for command in self._inbox:
                if isinstance(command, _Submit):
                    self._responses[command.sequence.request.request_id] = command
            self._inbox.clear()
            self._abandon(self._error or "the service is shutting down")
            self._deliver()
            self._condition.notify_all()
        self._busy_since = None
        self._stats = replace(
            self._stats, num_running=0, num_waiting=0, restarting=False, alive=False, error=self._error
        )

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when it is time to end."""
        with self._condition:
            while not (self._stop or self._inbox or self._woken or self._scheduler.running):
                self._condition.notify_all()
                deadline = self._next_deadline()
                patience = _IDLE_POLL_SECONDS if deadline is None else deadline - time.monotonic()
                if not self._condition.wait(min(patience, _IDLE_POLL_SECONDS)) and self._scheduler.has_work:
                    break  # nothing should be stuck in the queue, but nobody may depend on that
            self._woken = False
            return not self._stop

    def _take_commands(self) -> None:
        with self._condition:  # whoever drains must not find a submission neither here nor there
            while self._inbox:
                self._take(self._inbox.popleft())
            self._arriving.clear()

    def _take(self, command: _Command) -> None:
        match command:
            case _Submit(sequence=sequence):
                request = sequence.request
                self._responses[request.request_id] = command
                seed = request.sampling.seed
                self._seeds[sequence] = secrets.randbits(63) if seed is None else seed
                self._scheduler.add(sequence)
                if request.timeout_seconds is not None:
                    heapq.heappush(self._deadlines, (sequence.arrival + request.timeout_seconds, request.request_id))
            case _Abort(request_id=request_id):
                if request_id in self._responses:
                    self._finish(request_id, FinishReason.ABORT)
            case _Retire(digest=digest):
                self._residency.retire(digest)

    def _next_deadline(self) -> float | None:
        while self._deadlines and self._deadlines[0][1] not in self._responses:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _end_overdue(self) -> None:
        now = time.monotonic()
        while (deadline := self._next_deadline()) is not None and deadline <= now:
            self._finish(heapq.heappop(self._deadlines)[1], FinishReason.TIMEOUT, "its time was up")

    def _step(self) -> None:
        """Schedule, run, post-process."""
        if self._scheduler.has_work and self._busy_since is None:
            self._busy_since = time.monotonic()
        plan = self._scheduler.schedule()
        self._prefetch()
        for sequence, error in plan.rejected:
            self._finish(sequence.request.request_id, FinishReason.ERROR, _explain(error))
        if plan.work:
            self._run(plan)
        if not self._scheduler.running:
            self._busy_since = None  # whoever waits now waits for an adapter: the engine is not stuck
            self._woken |= bool(plan.work or plan.rejected)  # or for a seat that is free since this step
        if not self._scheduler.has_work:
            self._residency.check_integrity(self._scheduler.running + self._scheduler.paused)
        self._stats = self._picture()

    def _prefetch(self) -> None:
        """Adapters of the next waiting requests come nearer while this step is computed."""
        waiting = self._scheduler.waiting
        seen = (waiting.version, self._num_loads)
        if seen != self._prefetched_at or self._residency.slots.may_fetch_more:
            self._prefetched_at = seen
            self._residency.slots.prefetch(self._scheduler.upcoming(2 * self.config.max_lora_slots))

    def _run(self, plan: Plan) -> None:
        now = time.monotonic()
        for work in plan.work:
            if work.sequence.first_scheduled is None:
                work.sequence.first_scheduled = now
        try:
            sampled = self._runner.run(plan, self._seeds)
        except Exception:  # the step's requests end with an error; the engine lives on
            logger.exception("engine.step_failed")
            sampled = None
        if sampled is None:
            self._fail_step(plan)
            return
        now = time.monotonic()
        self._steps += 1
        self._last_step_at = now
        for work in plan.work:
            work.sequence.num_computed += work.num_tokens
            if work.is_prefill:
                self._residency.keep(work.sequence)
        for sequence, token in sampled:
            sequence.output_token_ids.append(token.token_id)
            sequence.token_times.append(now)
            self._respond(sequence, token)
        for work in plan.prefills:
            if work.sequence.needs_all_hidden and not work.sequence.is_prefill:
                self._respond_pooled(work.sequence)

    def _fail_step(self, plan: Plan) -> None:
        """Only the step's requests may have suffered. Raises when that is not so."""
        for work in plan.work:
            self._finish(work.sequence.request.request_id, FinishReason.ERROR, "internal error while decoding")
        self._residency.check_integrity(self._scheduler.running)
        self._self_check()

    def _self_check(self) -> None:
        """One token, past the queue: can this engine still compute? Raises what the forward raises."""
        sequence = Sequence(_SELF_CHECK, max_tokens=1)
        if self._residency.acquire(sequence) is not Admission.STARTED:
            return  # others hold all of the cache; their next step shows the same
        try:
            self._runner.run(Plan(prefills=[Work(sequence, 1, is_prefill=True, samples=True)]), {sequence: 0})
        finally:
            self._residency.release(sequence)
        self._last_step_at = time.monotonic()

    def _respond_pooled(self, sequence: Sequence) -> None:
        total = self._residency[sequence].hidden_sum
        assert total is not None, "every chunk of a pooling sequence is summed"
        vector = embedding(total, sequence.num_prompt_tokens)
        request_id = sequence.request.request_id
        if np.isfinite(vector).all():
            self._finish(request_id, FinishReason.STOP, embedding=vector)
        else:
            self._finish(request_id, FinishReason.ERROR, "the hidden states are not finite")

    def _respond(self, sequence: Sequence, token: Sampled) -> None:
        request_id, matcher = sequence.request.request_id, sequence.matcher
        if matcher is not None and not matcher.consume(token.token_id):
            logger.warning("engine.grammar_failed", extra={"request_id": request_id, "reason": matcher.error})
            self._finish(request_id, FinishReason.ERROR, f"the grammar could not be followed: {matcher.error}")
            return
        try:
            is_last = len(sequence.output_token_ids) >= sequence.max_tokens
            response = self._responses[request_id].response
            response.num_cached_tokens = sequence.num_cached_tokens or 0
            reason = response.add(token, is_last)
        except Exception:  # a fault in one answer's text must not touch the others
            logger.exception("engine.response_failed", extra={"request_id": request_id})
            self._finish(request_id, FinishReason.ERROR, "internal error while writing the answer")
            return
        if matcher is not None and matcher.is_complete:
            reason = FinishReason.STOP  # whatever `ignore_eos` says: no token could follow
        if reason is not None:
            self._finish(request_id, reason)

    def _finish(
        self,
        request_id: str,
        reason: FinishReason,
        error: str | None = None,
        embedding: NDArray[np.float32] | None = None,
    ) -> None:
        """Free what the sequence held, send the last chunk, tell the observer."""
        submitted = self._responses[request_id]
        sequence = submitted.sequence
        if sequence.status is not SequenceStatus.FINISHED:
            self._scheduler.remove(sequence)
        try:
            submitted.response.finish(reason, error, embedding)
        except Exception:
            logger.exception("engine.response_failed", extra={"request_id": request_id})
            submitted.response.abandon("internal error while writing the answer")
        self._forget(submitted, reason)

    def _abandon(self, error: str, *, keep_waiting: bool = False) -> None:
        """End every request with an error, touching neither scheduler nor cache: they may be what is broken.

        With `keep_waiting` those that had not started stay, once: one of them may be the cause.
        """
        for submitted in list(self._responses.values()):
            sequence = submitted.sequence
            if keep_waiting and not sequence.has_started and sequence.num_crashes == 0:
                sequence.num_crashes += 1
                sequence.status = SequenceStatus.WAITING
                continue
            sequence.status = SequenceStatus.FINISHED
            try:
                submitted.response.abandon(error)
            except Exception:  # the others must hear of it
                logger.exception("engine.response_failed", extra={"request_id": sequence.request.request_id})
            self._forget(submitted, FinishReason.ERROR)

    def _forget(self, submitted: _Submit, reason: FinishReason) -> None:
        sequence = submitted.sequence
        del self._responses[sequence.request.request_id]
        self._seeds.pop(sequence, None)
        try:
            self._observer.sequence_finished(sequence.report(reason, time.monotonic()))
        except Exception:  # who counts must not stop who works
            logger.exception("engine.observer_failed")

    def _deliver(self) -> None:
        """Hand this step's chunks to their event loops, one call each."""
        outbox, self._outbox = self._outbox, {}
        for loop, chunks in outbox.items():
            with suppress(RuntimeError):  # the loop is closed: its clients are gone
                loop.call_soon_threadsafe(_put_all, chunks)

    # -- small things -----------------------------------------------------------------------------------------

    def _max_tokens(self, request: GenerationRequest) -> int:
        length, limit = len(request.prompt_token_ids), self.base.max_model_len
        if request.pooling and self.embedding_size is None:
            raise RequestRejectedError(
                "this base does not show its hidden states", param="model", code="embeddings_unsupported"
            )
        if length == 0:
            raise RequestRejectedError("the prompt is empty", param="prompt", code="invalid_prompt")
        if length > (limit if request.pooling else limit - 1):  # an answer needs room for a token
            raise RequestRejectedError(
                f"the prompt has {length} tokens; this model takes at most {limit} with the answer",
                param="messages",
                code="context_length_exceeded",
            )
        if not all(0 <= token < self.base.vocab_size for token in request.prompt_token_ids):
            raise RequestRejectedError(
                f"token ids must lie in 0..{self.base.vocab_size - 1}", param="prompt", code="invalid_prompt"
            )
        if request.pooling:
            return 0
        for token, _ in request.sampling.logit_bias:
            if not 0 <= token < self.base.vocab_size:
                raise RequestRejectedError(
                    f"'logit_bias' names token {token}; token ids lie in 0..{self.base.vocab_size - 1}",
                    param="logit_bias",
                    code="invalid_value",
                )
        wanted = request.sampling.max_tokens
        return limit - length if wanted is None else min(wanted, limit - length)

    def _check_room(self, tenant: str) -> None:
        """A tenant may have no more requests waiting than the queue has room for: alone it fills one half of it, two
        fill a third each, and a newcomer always finds room."""
        waiting = self._scheduler.waiting
        mine = waiting.num_waiting_of(tenant) + self._arriving[tenant]
        room = self.config.max_waiting - len(waiting) - self._arriving.total()
        if mine >= room:
            raise QueueFullError(f"{mine} of your requests are waiting already", retry_after=self._retry_after())

    def _retry_after(self) -> float:
        """A guess from how long the queue is; clients stop obeying above 120 s."""
        return min(60.0, 1.0 + self._scheduler.num_waiting / max(1, self.config.max_num_seqs))

    def _post(self, command: _Command) -> None:
        with self._condition:
            if not self._stop:
                self._inbox.append(command)
                self._condition.notify_all()

    def _wake(self) -> None:
        with self._condition:
            self._num_loads += 1
            self._woken = True
            self._condition.notify_all()

    def _count_preemption(self, sequence: Sequence) -> None:
        self._preemptions += 1
        logger.info("engine.preempted", extra={"request_id": sequence.request.request_id})

    def _picture(self) -> EngineStats:
        slots, scheduler = self._residency.slots, self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            kv_usage=self._residency.cache.usage,
            slots={"device": slots.num_slots, "host": self.config.max_host_adapters},
            resident={"device": slots.resident(), "host": self._host.digests()},
            waiting_adapters=scheduler.waiting.adapters(),
            num_steps=self._steps,
            num_preemptions=self._preemptions,
            last_step_at=self._last_step_at,
            busy_since=self._busy_since,
            num_restarts=self._num_restarts,
            restarting=self._restarting,
            alive=not self._stop,
            error=self._error,
        )


def _preparing(source: Callable[[str], LoraWeights], base: BaseModel) -> Callable[[str], PreparedAdapter]:
    """What a loading thread does: read and verify, then everything that a slot need not wait for."""
    sites = list(dict.fromkeys(base.lora_sites.values()))
    pinned = base.device.type == "cuda"

    def load(digest: str) -> PreparedAdapter:
        return prepare(source(digest), sites, base.dtype, pinned=pinned)

    return load


def _decoding_stream(device: torch.device) -> AbstractContextManager[object]:
    """On CUDA a stream that goes before training's; on CPU the kernel arbitrates by thread priority."""
    if device.type != "cuda":
        return nullcontext()
    torch.cuda.synchronize(device)
    return torch.cuda.stream(torch.cuda.Stream(device, priority=-1))  # type: ignore[no-untyped-call]


def _is_lost(device: torch.device) -> bool:
    """After some CUDA errors no call of this process succeeds any more: only a new process helps."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _put_all(chunks: list[tuple[asyncio.Queue[OutputChunk], OutputChunk]]) -> None:
    for queue, chunk in chunks:
        queue.put_nowait(chunk)


def _explain(error: Exception) -> str:
    if isinstance(error, AdapterError):
        return error.message
    logger.error("engine.admission_failed", exc_info=error)
    return "internal error while starting the request"
