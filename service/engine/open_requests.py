"""The requests that were taken in and have not ended: their answers, seeds and deadlines. Knows no plan and no cache.

Belongs to the engine's thread. A fault in one answer's text ends that answer and touches no other.
"""

from __future__ import annotations

import heapq
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.engine.errors import EngineError
from service.engine.intake import Submit
from service.engine.observation import EngineObserver
from service.engine.sampler import Sampled
from service.engine.sequence import FinishReason, Sequence, SequenceStatus

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """Why an answer ends, and what its last chunk carries."""

    reason: FinishReason
    error: str | None = None
    embedding: NDArray[np.float32] | None = None
    prompt_nll: float | None = None
    refusal: EngineError | None = None
    """Says, in place of an answer, that there will be none."""


class OpenRequests:
    """Who waits for an answer."""

    def __init__(self, observer: EngineObserver) -> None:
        self._observer = observer
        self._submitted: dict[str, Submit] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap; requests that have ended leave it in their time
        self.seeds: dict[Sequence, int] = {}

    def __len__(self) -> int:
        return len(self._submitted)

    def sequences(self) -> list[Sequence]:
        return [submitted.sequence for submitted in self._submitted.values()]

    def find(self, request_id: str) -> Sequence | None:
        submitted = self._submitted.get(request_id)
        return None if submitted is None else submitted.sequence

    def add(self, submitted: Submit) -> None:
        sequence = submitted.sequence
        request, seed = sequence.request, sequence.request.sampling.seed
        self._submitted[request.request_id] = submitted
        self.seeds[sequence] = secrets.randbits(63) if seed is None else seed
        if request.timeout_seconds is not None:
            heapq.heappush(self._deadlines, (sequence.arrival + request.timeout_seconds, request.request_id))

    def next_deadline(self) -> float | None:
        while self._deadlines and self._deadlines[0][1] not in self._submitted:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def overdue(self) -> Iterator[Sequence]:
        """Those whose time is up; each is named once."""
        now = time.monotonic()
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            yield self._submitted[heapq.heappop(self._deadlines)[1]].sequence

    def write(self, sequence: Sequence, token: Sampled) -> Ending | None:
        """Take a sampled token into the answer; returns how the answer ends with it, or None."""
        request_id, matcher = sequence.request.request_id, sequence.matcher
        if matcher is not None and not matcher.consume(token.token_id):
            logger.warning("engine.grammar_failed", extra=sequence.request.log_ids)  # why may quote the answer
            return Ending(FinishReason.ERROR, f"the grammar could not be followed: {matcher.error}")
        try:
            is_last = len(sequence.output_token_ids) >= sequence.max_tokens
            response = self._submitted[request_id].response
            response.num_cached_tokens = sequence.num_cached_tokens or 0
            reason = response.add(token, is_last)
        except Exception:  # a fault in one answer's text must not touch the others
            logger.exception("engine.response_failed", extra=sequence.request.log_ids)
            return Ending(FinishReason.ERROR, "internal error while writing the answer")
        if matcher is not None and matcher.is_complete:
            reason = FinishReason.STOP  # whatever `ignore_eos` says: no token could follow
        return None if reason is None else Ending(reason)

    def finish(self, sequence: Sequence, ending: Ending) -> None:
        """Send the last chunk, tell the observer."""
        request_id = sequence.request.request_id
        response = self._submitted[request_id].response
        try:
            if ending.refusal is not None:
                response.refuse(ending.refusal)
            else:
                measured = sequence.measured(ending.prompt_nll)
                response.finish(ending.reason, ending.error, ending.embedding, measured)
        except Exception:
            logger.exception("engine.response_failed", extra=sequence.request.log_ids)
            response.abandon("internal error while writing the answer")
        self._forget(sequence, ending.reason)

    def abandon(self, error: str, *, keep_waiting: bool = False) -> None:
        """End every request with an error, touching neither scheduler nor cache: they may be what is broken.

        With `keep_waiting` those that had not started stay, once: one of them may be the cause.
        """
        for submitted in list(self._submitted.values()):
            sequence = submitted.sequence
            if keep_waiting and not sequence.has_started and sequence.num_crashes == 0:
                sequence.num_crashes += 1
                sequence.status = SequenceStatus.WAITING
                continue
            sequence.status = SequenceStatus.FINISHED
            try:
                submitted.response.abandon(error)
            except Exception:  # the others must hear of it
                logger.exception("engine.response_failed", extra=sequence.request.log_ids)
            self._forget(sequence, FinishReason.ERROR)

    def _forget(self, sequence: Sequence, reason: FinishReason) -> None:
        del self._submitted[sequence.request.request_id]
        self.seeds.pop(sequence, None)
        try:
            self._observer.sequence_finished(sequence.report(reason, time.monotonic()))
        except Exception:  # who counts must not stop who works
            logger.exception("engine.observer_failed", extra=sequence.request.log_ids)
