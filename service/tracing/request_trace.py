"""The spans of one API request: its own, and under it where the time of each of its sequences went.

Names and attributes follow OpenTelemetry's conventions for HTTP servers and for generative AI
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/). No span carries text of a prompt or an answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

from service.engine.phases import Phase, PhaseName
from service.engine.sequence import GenerationRequest, SequenceReport

OPERATION_NAMES = {"chat": "chat", "completions": "text_completion", "embeddings": "embeddings"}


class RequestTrace:
    """Made when the request arrives, `ended` when its last byte is out. The engine's threads report sequences."""

    def __init__(self, tracer: Tracer, parent: Context, method: str, path: str) -> None:
        self._tracer = tracer
        self._method = method
        self._monotonic_to_unix = time.time_ns() - time.monotonic_ns()
        attributes = {"http.request.method": method, "url.path": path}
        self._span = tracer.start_span(method, parent, SpanKind.SERVER, attributes)
        self._index: dict[str, int] = {}
        self._prompts: list[int] = []
        self._reports: dict[int, SequenceReport] = {}

    @property
    def trace_id(self) -> str:
        return f"{self._span.get_span_context().trace_id:032x}"

    def asked(
        self, operation: str, model: str, resolved: str, answer_id: str, requests: Sequence[GenerationRequest]
    ) -> None:
        """It is understood: `model` is the name that was asked for, `resolved` the id that answers to it."""
        self._index = {request.request_id: index for index, request in enumerate(requests)}
        self._prompts = [id(request.prompt_token_ids) for request in requests]  # the choices of a prompt share it
        first = requests[0]
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": OPERATION_NAMES[operation],
            "gen_ai.provider.name": "rootstock",
            "gen_ai.request.model": model,
            "gen_ai.response.model": resolved,
            "gen_ai.response.id": answer_id,
        }
        if first.adapter is not None:
            attributes["rootstock.adapter.digest"] = first.adapter
        if not first.pooling:
            attributes |= _sampling(first)
            if len(requests) > 1:
                attributes["gen_ai.request.choice.count"] = len(requests)
        self._span.set_attributes(attributes)

    def sequence_finished(self, report: SequenceReport) -> None:
        """Its phases become spans; they may come after the request's own has ended."""
        if not self._span.get_span_context().trace_flags.sampled:
            return
        index = self._index[report.request_id]
        self._reports[index] = report
        parent = set_span_in_context(self._span)
        for phase in report.phases:
            span = self._tracer.start_span(
                phase.name.value,
                parent,
                attributes={"rootstock.sequence.index": index, **_of_phase(phase, report)},
                start_time=self._unix_ns(phase.start),
            )
            span.end(self._unix_ns(phase.end))

    def ended(self, route: str | None, status: int | None, outcome: str, ids: Mapping[str, str | None]) -> None:
        """`route` is the path's template; `ids` name the request and the tenant."""
        span = self._span
        if route is not None:
            span.update_name(f"{self._method} {route}")
            span.set_attribute("http.route", route)
        if status is not None:
            span.set_attribute("http.response.status_code", status)
        span.set_attributes({f"rootstock.{name}": value for name, value in ids.items() if value is not None})
        span.set_attribute("rootstock.outcome", outcome)
        if self._reports:
            span.set_attributes(self._usage())
        if outcome == "error":
            span.set_attribute("error.type", str(status) if status is not None and status >= 500 else "stream_failed")
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def _usage(self) -> dict[str, AttributeValue]:
        """A prompt counts once, however many choices it gets; cached is what none of them computed."""
        inputs: dict[int, int] = {}
        cached: dict[int, int] = {}
        indices = sorted(self._reports)
        reports = [self._reports[index] for index in indices]
        for index, report in zip(indices, reports, strict=True):
            prompt, num_cached = self._prompts[index], report.num_cached_tokens or 0
            inputs[prompt] = report.num_prompt_tokens
            cached[prompt] = min(num_cached, cached.get(prompt, num_cached))
        return {
            "gen_ai.response.finish_reasons": [report.finish_reason.value for report in reports],
            "gen_ai.usage.input_tokens": sum(inputs.values()),
            "gen_ai.usage.output_tokens": sum(report.num_output_tokens for report in reports),
            "gen_ai.usage.cache_read.input_tokens": sum(cached.values()),
        }

    def _unix_ns(self, monotonic: float) -> int:
        return int(monotonic * 1e9) + self._monotonic_to_unix


def _sampling(request: GenerationRequest) -> dict[str, AttributeValue]:
    sampling = request.sampling
    attributes: dict[str, AttributeValue] = {
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
    }
    if sampling.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = sampling.max_tokens
    if sampling.seed is not None:
        attributes["gen_ai.request.seed"] = sampling.seed
    return attributes


def _of_phase(phase: Phase, report: SequenceReport) -> dict[str, AttributeValue]:
    match phase.name:
        case PhaseName.ADAPTER_LOAD if report.adapter is not None:
            return {"rootstock.adapter.digest": report.adapter}
        case PhaseName.PREFILL:
            return {
                "gen_ai.usage.input_tokens": report.num_prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": report.num_cached_tokens or 0,
            }
        case PhaseName.DECODE:
            return {
                "gen_ai.usage.output_tokens": report.num_output_tokens,
                "gen_ai.response.finish_reasons": [report.finish_reason.value],
            }
    return {}
