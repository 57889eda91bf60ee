"""What one answer tells of its model: its record, and what an experiment measures of it. Knows nothing of its JSON.

Everything here runs on the event loop and only appends to `service.traffic_log` and to the queue of `service.drift`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from urllib.parse import quote

from adapters.errors import AdapterError
from service.answer_digest import answer_digest
from service.api.keepsake import Keepsake
from service.captures import MAX_EXCHANGE_BYTES, Exchange
from service.drift_intake import DriftTap
from service.engine.errors import AdapterUnavailableError
from service.engine.sequence import FinishReason, GenerationRequest, OutputChunk
from service.errors import ClientDisconnectedError, DeadlineExceededError, GenerationFailedError
from service.experiment import Arm, Measure
from service.rollout import Rollout
from service.routing import Route
from service.shadows import Answered, Shadows
from service.traffic_log import CompletionRecord, WholeAnswer


class AnswerWatch:
    """Of one request. `is_watching`: whether its chunks are wanted: by an experiment, for later feedback, or by the
    watch for drift."""

    def __init__(
        self,
        rollout: Rollout,
        completion_id: str,
        tenant_id: str,
        route: Route,
        requests: Sequence[GenerationRequest],
        keepsake: Keepsake | None = None,
        tap: DriftTap | None = None,
    ) -> None:
        """`tap` is the watch for drift's; it hears of the first choice."""
        self._rollout = rollout
        self._id = completion_id
        self._tenant_id = tenant_id
        self._route = route
        self._original = requests[0]
        shadow = route.shadow
        self._shadow = shadow if shadow is not None and Shadows.wants(shadow, completion_id) else None
        self._tap = tap
        self._keepsake = keepsake
        self._texts: list[str] | None = [] if len(requests) == 1 and rollout.traffic.records_completions else None
        self._is_compared = route.trial is not None or self._shadow is not None
        self.is_watching = self._is_compared or self._texts is not None or tap is not None
        self._start = time.perf_counter()
        self._answered = Answered()
        self._num_tokens = 0
        self._num_cut = 0
        self._ended = False

    @property
    def headers(self) -> dict[str, str]:
        told = {} if self._route.trial is None else {"x-rootstock-arm": self._route.trial.arm.value}
        if self._route.fallen_from is not None:
            told["x-rootstock-fallback-from"] = quote(self._route.fallen_from, safe=":/")
        return told

    def started(self) -> None:
        """The client is about to learn the completion's id."""
        model, route = self._route.model, self._route
        record = CompletionRecord(
            self._id, self._tenant_id, model.id, model.digest, route.alias, route.trial, time.time()
        )
        self._rollout.traffic.completed(record)

    def add(self, index: int, chunk: OutputChunk) -> None:
        if index == 0:
            if self._tap is not None:
                self._tap.add(chunk)
            if self._is_compared:
                self._answered.add(chunk)
        if self._texts is not None:
            self._texts.append(chunk.text)
        if chunk.finish_reason is not None:
            self._num_tokens += chunk.num_output_tokens
            self._num_cut += chunk.finish_reason is FinishReason.LENGTH

    def finished(self) -> None:
        """All choices are whole."""
        if self._ended:
            return
        self._ended = True
        self._answered.seconds = time.perf_counter() - self._start
        if self._tap is not None:
            self._tap.finished()
        if (trial := self._route.trial) is not None:
            self._count(
                {
                    (trial.arm, Measure.ERROR): 0.0,
                    (trial.arm, Measure.ABORTED): 0.0,
                    (trial.arm, Measure.SECONDS): self._answered.seconds,
                    (trial.arm, Measure.TOKENS): float(self._num_tokens),
                    (trial.arm, Measure.LENGTH): float(self._num_cut > 0),
                }
            )
        if self._shadow is not None:
            self._rollout.shadows.offer(self._shadow, self._original, self._answered)
        if self._texts is not None:
            self._remember("".join(self._texts))

    def _remember(self, text: str) -> None:
        """What feedback will be compared with; and the text itself, where the tenant lets it be kept."""
        exchange = None
        if self._keepsake is not None and text:
            kept, model = self._keepsake, self._route.model.id
            exchange = Exchange(self._id, self._tenant_id, kept.user_digest, model, kept.prompt, text, time.time())
            exchange = exchange if exchange.num_bytes <= MAX_EXCHANGE_BYTES else None
        digest = answer_digest(self._id, text)
        self._rollout.traffic.answered(WholeAnswer(self._id, self._tenant_id, digest, exchange))

    def failed(self, error: BaseException) -> None:
        """It ended otherwise. Only what the model or the service did counts as an error of the arm."""
        if isinstance(error, (ClientDisconnectedError, asyncio.CancelledError)):
            self.abandoned()
        if self._ended:
            return
        self._ended = True
        if (trial := self._route.trial) is None:
            return
        if isinstance(error, (GenerationFailedError, AdapterError, AdapterUnavailableError)) or self._is_our_deadline(
            error
        ):
            self._count({(trial.arm, Measure.ERROR): 1.0, (trial.arm, Measure.ABORTED): 0.0})

    def abandoned(self) -> None:
        """The client went away first; no effect if the answer had ended."""
        if self._ended:
            return
        self._ended = True
        if (trial := self._route.trial) is not None:
            self._count({(trial.arm, Measure.ABORTED): 1.0})

    def _is_our_deadline(self, error: BaseException) -> bool:
        """A client's own short `timeout` says nothing of the model."""
        limit = self._rollout.request_timeout_seconds
        wanted = self._original.timeout_seconds
        return isinstance(error, DeadlineExceededError) and limit is not None and wanted == limit

    def _count(self, values: dict[tuple[Arm, Measure], float]) -> None:
        trial = self._route.trial
        assert trial is not None
        self._rollout.traffic.observed(self._tenant_id, trial.experiment_id, values)
        ended = "aborted" if values[trial.arm, Measure.ABORTED] else "success"
        outcome = "error" if values.get((trial.arm, Measure.ERROR)) else ended
        self._rollout.metrics.canary_answered(trial.arm.value, outcome)
