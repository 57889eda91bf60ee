"""The spans of one run of a fine-tuning job: the run, its phases, and training in slices. Knows no trainer.

A run of any length has few spans: a slice lasts SLICE_SECONDS at least and a fiftieth of the run so far.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from statistics import fmean
from typing import TYPE_CHECKING

from service.job import Claim

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer
    from opentelemetry.util.types import AttributeValue

SLICE_SECONDS = 5.0
SLICES_BEFORE_THEY_GROW = 50


class JobTrace:
    """Without a tracer it costs a comparison and makes nothing."""

    def __init__(self, claim: Claim, tracer: Tracer | None = None) -> None:
        self._tracer = tracer
        self._began_ns = self._slice_ns = time.time_ns()
        self._step = self._num_steps = self._num_tokens = 0
        self._losses: list[float] = []
        if tracer is None:
            return
        from opentelemetry.trace import set_span_in_context

        job = claim.job
        self._span = tracer.start_span(
            "fine_tuning_job",
            attributes={
                "rootstock.job_id": job.id,
                "rootstock.tenant": job.tenant_id,
                "rootstock.job.attempt": claim.attempt,
                "rootstock.job.method": job.spec.method.value,
                "gen_ai.request.model": job.spec.model,
            },
        )
        self._context: Context = set_span_in_context(self._span)

    @property
    def log_ids(self) -> dict[str, str]:
        if self._tracer is None:
            return {}
        return {"trace_id": f"{self._span.get_span_context().trace_id:032x}"}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside is a span; of an exception it carries the kind, never the words."""
        if self._tracer is None:
            yield
            return
        span = self._tracer.start_span(name, self._context)
        try:
            yield
        except BaseException as error:
            span.set_attribute("error.type", type(error).__name__)
            raise
        finally:
            span.end()

    def stepped(self, step: int, num_tokens: int, loss: float) -> None:
        """An optimizer step is done."""
        if self._tracer is None:
            return
        self._step = step
        self._num_steps += 1
        self._num_tokens += num_tokens
        if isfinite(loss):  # a step that was skipped has none
            self._losses.append(loss)
        now = time.time_ns()
        least = max(SLICE_SECONDS * 1e9, (now - self._began_ns) / SLICES_BEFORE_THEY_GROW)
        if now - self._slice_ns >= least:
            self._end_slice(step, now)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Steps are taken inside; the last slice ends with it, however it ends."""
        self._slice_ns = time.time_ns()
        try:
            yield
        finally:
            if self._tracer is not None and self._num_steps:
                self._end_slice(self._step, time.time_ns())

    def ended(self, outcome: str, *, failed: bool) -> None:
        if self._tracer is None:
            return
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("rootstock.outcome", outcome)
        if failed:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()

    def _end_slice(self, step: int, now: int) -> None:
        assert self._tracer is not None
        attributes: dict[str, AttributeValue] = {
            "rootstock.training.first_step": step - self._num_steps + 1,
            "rootstock.training.last_step": step,
            "rootstock.training.tokens": self._num_tokens,
        }
        if self._losses:
            attributes["rootstock.training.mean_loss"] = fmean(self._losses)
        self._tracer.start_span("training_slice", self._context, attributes=attributes, start_time=self._slice_ns).end(
            now
        )
        self._slice_ns, self._num_steps, self._num_tokens, self._losses = now, 0, 0, []
