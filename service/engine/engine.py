"""The loop: schedule, run, post-process. Requests come in by messages, text goes out by callbacks.

One thread owns sequences, cache, slots and the forward; nothing else touches them. Knows no HTTP and no metrics
library: an `EngineObserver` hears of finished sequences. What comes in waits in `intake.py`, who waits for an answer
stands in `open_requests.py`, chunks go out through `outbox.py`.

A fault is met where it does least harm: in one answer's text it ends that answer, in a step the step's requests.
What escapes from there is a crash: whoever had started gets an error, the machinery (`machinery.py`) is made anew
around the base that stays loaded, and the loop goes on after a forward has succeeded. Too many crashes within a
minute, or a lost device, end the engine for good.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from adapters.errors import AdapterError, StoreError
from adapters.host_cache import HostCache
from adapters.lora_weights import LoraWeights
from adapters.prepared import preparing
from service.engine.base_model import BaseModel
from service.engine.crash_limit import CrashLimit
from service.engine.detokenizer import TokenBytes
from service.engine.device import decoding_stream, is_lost
from service.engine.engine_config import EngineConfig
from service.engine.errors import AdapterUnavailableError
from service.engine.intake import Abort, Command, Forget, Intake, Retire, Submit
from service.engine.machinery import Machinery
from service.engine.observation import EngineObserver, EngineStats
from service.engine.open_requests import Ending, OpenRequests
from service.engine.plan import Plan
from service.engine.pooling import embedding, watch_hidden_states
from service.engine.request_check import checked_max_tokens
from service.engine.response import Response
from service.engine.sequence import FinishReason, GenerationRequest, OutputChunk, Sequence, SequenceStatus
from service.engine.serving_engine import ServingEngine
from service.engine.step_times import StepTimes

logger = logging.getLogger(__name__)

MAX_CRASHES, CRASH_WINDOW_SECONDS = 3, 60.0
STORE_RETRY_SECONDS = 5.0
"""When to ask again for an adapter whose store did not answer."""
MAX_STEP_SECONDS = 5.0
"""When shutting down, the last step may take no longer."""

_TENANT_IS_GONE = Ending(FinishReason.ERROR, "the tenant was deleted")


class Engine(ServingEngine):
    """Continuous batching over one base and many adapters."""

    base: BaseModel

    def __init__(
        self,
        base: BaseModel,
        source: Callable[[str], LoraWeights],
        config: EngineConfig,
        observer: EngineObserver,
        *,
        on_delivered: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_delivered` is called in the engine's thread when all chunks of a step have been handed over."""
        super().__init__()
        self.base = base
        self.config = config
        self._observer = observer
        self._intake = Intake(max_waiting=config.max_waiting, max_num_seqs=config.max_num_seqs)
        self._requests = OpenRequests(observer)
        self._on_delivered = on_delivered
        self._host = HostCache(
            preparing(source, base.lora_sites.values(), base.dtype, pinned=base.device.type == "cuda"),
            capacity=config.max_host_adapters,
            max_bytes=config.host_adapter_bytes,
            observer=observer,
            on_ready=self._intake.wake,
        )
        self.embedding_size = watch_hidden_states(base)
        self.step_times = StepTimes()
        self._machinery = self._build()
        self._crashes = CrashLimit(MAX_CRASHES, CRASH_WINDOW_SECONDS)
        self._token_bytes = TokenBytes(base.tokenizer)
        self._forgotten: set[str] = set()
        self._restarting = False
        self._error: str | None = None
        self._steps = self._preemptions = self._num_restarts = 0
        self._last_step_at: float | None = None
        self._busy_since: float | None = None
        self._beside: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._stats = self._picture()

    # -- what other threads call ------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def before_draining(self, stop: Callable[[], None]) -> None:
        """`stop` is called when shutting down begins, of something that asks the engine or works beside it. It must not
        wait."""
        self._beside.append(stop)

    def shutdown(self, drain_seconds: float) -> None:
        for stop in self._beside:
            stop()
        runs = self._thread.is_alive()
        self._intake.drain(drain_seconds if runs else 0, is_busy=lambda: len(self._requests) > 0)
        if runs:
            self._thread.join(MAX_STEP_SECONDS)
        if self._thread.is_alive():
            logger.warning("engine.stop_timed_out")  # a step that hangs; the process ends over it
            return
        self._host.close()

    def submit(self, request: GenerationRequest, on_chunk: Callable[[OutputChunk], None]) -> None:
        max_tokens = checked_max_tokens(request, self.base, can_embed=self.embedding_size is not None)
        response = Response(request, self.base, self._token_bytes, on_chunk)
        submitted = Submit(Sequence(request, max_tokens), response)
        self._intake.submit(submitted, self._machinery.scheduler.waiting)

    def abort(self, request_id: str) -> None:
        self._intake.post(Abort(request_id))

    def retire(self, digest: str) -> None:
        self._intake.post(Retire(digest))

    def forget_tenant(self, tenant: str) -> None:
        self._intake.post(Forget(tenant))

    def stats(self) -> EngineStats:
        """The picture after the last step; only `busy_since` is of now, so that a step that hangs can be seen."""
        return replace(self._stats, busy_since=self._busy_since)

    @property
    def is_busy(self) -> bool:
        """Somebody waits for a token, as of now. Cheap enough to ask all the time."""
        return self._busy_since is not None

    # -- the engine's thread: its life ------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            with decoding_stream(self.base.device):
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
                self._intake.take(self._obey)
                for sequence in self._requests.overdue():
                    self._finish(sequence, Ending(FinishReason.TIMEOUT, "its time was up"))
                self._step()
                self._deliver()
        except BaseException:
            if self._crashes.exceeded_by_another() or is_lost(self.base.device):
                raise
            logger.exception("engine.crashed")
            self._restarting = True
            self._busy_since = time.monotonic()
            self._stats = replace(self._stats, restarting=True)
            self._requests.abandon("the engine failed and is restarting", keep_waiting=True)
            self._deliver()
            return False
        return True

    def _restart(self) -> None:
        """Everything anew but the base and the adapters in host memory. Over when a forward has succeeded."""
        self._machinery.close()
        self._machinery = self._build()
        self._self_check()
        self._restarting, self._busy_since = False, None
        self._num_restarts += 1
        for sequence in self._requests.sequences():
            self._machinery.scheduler.add(sequence)
        self._stats = self._picture()
        logger.warning("engine.restarted", extra={"num_restarts": self._num_restarts})
        self._intake.wake()

    def _build(self) -> Machinery:
        return Machinery(self.base, self.config, self._host, self._observer, self._count_preemption)

    def _end(self) -> None:
        """Nothing will run any more: tell everybody, whatever state the rest is in."""
        for submitted in self._intake.close(self._error):
            self._requests.add(submitted)
        self._requests.abandon(self._error or "the service is shutting down")
        self._deliver()
        self._busy_since = None
        self._stats = replace(
            self._stats, num_running=0, num_waiting=0, restarting=False, alive=False, error=self._error
        )

    # -- the engine's thread: schedule, run, post-process -----------------------------------------------------

    def _wait_for_work(self) -> bool:
        scheduler = self._machinery.scheduler
        return self._intake.wait(
            has_running=bool(scheduler.running),
            has_work=scheduler.has_work,
            deadline=self._requests.next_deadline(),
        )

    def _obey(self, command: Command) -> None:
        match command:
            case Submit(sequence=sequence):
                self._requests.add(command)
                self._machinery.scheduler.add(sequence)
                if sequence.request.tenant in self._forgotten:  # it was on its way when its tenant was deleted
                    self._finish(sequence, _TENANT_IS_GONE)
            case Abort(request_id=request_id):
                if (found := self._requests.find(request_id)) is not None:
                    self._finish(found, Ending(FinishReason.ABORT))
            case Retire(digest=digest):
                self._machinery.residency.retire(digest)
            case Forget(tenant=tenant):
                self._forgotten.add(tenant)
                for sequence in self._requests.sequences():
                    if sequence.request.tenant == tenant:
                        self._finish(sequence, _TENANT_IS_GONE)
                self._machinery.forget_tenant(tenant)

    def _step(self) -> None:
        """Schedule, run, post-process."""
        scheduler = self._machinery.scheduler
        if scheduler.has_work and self._busy_since is None:
            self._busy_since = time.monotonic()
        plan = scheduler.schedule()
        self._machinery.prefetch(self._intake.num_wakes)
        for sequence, error in plan.rejected:
            self._finish(sequence, _ending_of(error, sequence))
        if plan.work:
            self._run(plan)
        if not scheduler.running:
            self._busy_since = None  # whoever waits now waits for an adapter: the engine is not stuck
            if plan.work or plan.rejected:
                self._intake.stay_awake()  # or for a seat that is free since this step
        if not scheduler.has_work:
            self._machinery.residency.check_integrity(scheduler.running + scheduler.paused)
        self._stats = self._picture()

    def _run(self, plan: Plan) -> None:
        now = time.monotonic()
        for work in plan.work:
            if work.sequence.times.first_scheduled is None:
                work.sequence.times.first_scheduled = now
        try:
            sampled = self._machinery.runner.run(plan, self._requests.seeds)
        except Exception:  # the step's requests end with an error; the engine lives on
            logger.exception("engine.step_failed", extra={"sequences": [w.sequence.request.log_ids for w in plan.work]})
            sampled = None
        if sampled is None:
            self._fail_step(plan)
            return
        now = time.monotonic()
        if plan.decodes and not plan.prefills and self._last_step_at is not None:
            self.step_times.add(now - self._last_step_at)  # whoever decodes had its last token then
        self._steps += 1
        self._last_step_at = now
        for work in plan.work:
            work.sequence.num_computed += work.num_tokens
            if work.is_prefill:
                self._machinery.residency.keep(work.sequence)
        for sequence, token in sampled:
            sequence.take(token.token_id, now, token.measures)
            if (ending := self._requests.write(sequence, token)) is not None:
                self._finish(sequence, ending)
        for work in plan.prefills:
            if work.sequence.needs_all_hidden and not work.sequence.is_prefill:
                self._finish(work.sequence, self._pooled(work.sequence))

    def _pooled(self, sequence: Sequence) -> Ending:
        place, num_tokens = self._machinery.residency[sequence], sequence.num_prompt_tokens
        assert place.hidden_sum is not None, "every chunk of a pooling sequence is summed"
        vector = embedding(place.hidden_sum, num_tokens)
        if not np.isfinite(vector).all():
            return Ending(FinishReason.ERROR, "the hidden states are not finite")
        nll = None if place.nll_sum is None or num_tokens < 2 else float(place.nll_sum) / (num_tokens - 1)
        return Ending(FinishReason.STOP, embedding=vector, prompt_nll=nll)

    def _fail_step(self, plan: Plan) -> None:
        """Only the step's requests may have suffered. Raises when that is not so."""
        for work in plan.work:
            self._finish(work.sequence, Ending(FinishReason.ERROR, "internal error while decoding"))
        self._machinery.residency.check_integrity(self._machinery.scheduler.running)
        self._self_check()

    def _self_check(self) -> None:
        if self._machinery.self_check():
            self._last_step_at = time.monotonic()

    def _finish(self, sequence: Sequence, ending: Ending) -> None:
        """Free what the sequence held and end its answer."""
        if sequence.status is not SequenceStatus.FINISHED:
            self._machinery.scheduler.remove(sequence)
        self._requests.finish(sequence, ending)

    def _deliver(self) -> None:
        self._outbox.deliver()
        self._on_delivered()

    def _count_preemption(self, sequence: Sequence) -> None:
        self._preemptions += 1
        logger.info("engine.preempted", extra=sequence.request.log_ids)

    def _picture(self) -> EngineStats:
        residency, scheduler = self._machinery.residency, self._machinery.scheduler
        slots = residency.slots
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            kv_usage=residency.cache.usage,
            slots={"device": slots.num_slots, "host": self.config.max_host_adapters},
            resident={"device": slots.resident(), "host": self._host.digests()},
            waiting_adapters=scheduler.waiting.adapters(),
            num_pinned=len(slots.references()),
            num_steps=self._steps,
            num_preemptions=self._preemptions,
            last_step_at=self._last_step_at,
            busy_since=self._busy_since,
            num_restarts=self._num_restarts,
            restarting=self._restarting,
            alive=not self._intake.stopped,
            error=self._error,
        )


def _ending_of(error: Exception, sequence: Sequence) -> Ending:
    """Of a sequence that could not start, nor go on after it was preempted."""
    if not isinstance(error, AdapterError):
        logger.error("engine.admission_failed", exc_info=error, extra=sequence.request.log_ids)
        return Ending(FinishReason.ERROR, "internal error while starting the request")
    refusal = AdapterUnavailableError(
        error.message,
        code=error.code or "adapter_unavailable",
        digest=sequence.request.adapter or "",
        retry_after=STORE_RETRY_SECONDS if isinstance(error, StoreError) else None,
    )
    return Ending(FinishReason.ERROR, error.message, refusal=refusal)
