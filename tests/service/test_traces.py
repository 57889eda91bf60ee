"""Traces of requests over the real engine, in memory; of jobs, from what a run tells; and when there are none."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from service.config import Settings, SettingsError, load_settings
from service.engine.base_model import load_base_model
from service.engine.phases import PhaseName, PhaseTimes
from service.job import Claim
from service.tracing.configuration import open_traces, traces_endpoint
from service.tracing.job_trace import JobTrace
from service.tracing.traceparent import trace_id_of
from service.tracing.traces import Traces
from tests.service.control_fixtures import Control
from tests.service.real_service import ADAPTER, RealService, real_service, serve_real

__all__ = ["real_service"]

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
PROMPT: list[Any] = [{"role": "user", "content": "quinces, unheard of"}]


class Traced:
    """A service that is traced, and its spans."""

    def __init__(self, service: RealService, exporter: InMemorySpanExporter) -> None:
        self.service = service
        self.exporter = exporter

    def spans(self) -> list[ReadableSpan]:
        """Of everything since the last call; the last byte is out a moment before the request's span."""
        for _ in range(500):
            found = self.exporter.get_finished_spans()
            if any(span.kind is SpanKind.SERVER for span in found):
                self.exporter.clear()
                return list(found)

            time.sleep(0.01)
        raise AssertionError("no request was traced")


@pytest.fixture(scope="module")
def module_traced(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    exporter = InMemorySpanExporter()
    traces = Traces(SimpleSpanProcessor(exporter), "api")
    base = load_base_model(str(tiny_llama_dir), quantization="none", name="tiny")
    with serve_real(base, tmp_path_factory.mktemp("traced"), traces=traces) as service:
        yield Traced(service, exporter)
    traces.close()


@pytest.fixture
def traced(module_traced: Traced) -> Traced:
    module_traced.exporter.clear()
    return module_traced


def of(spans: list[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_chat_is_one_span_and_under_it_the_phases_of_its_sequence(traced: Traced) -> None:
    answer = traced.service.client().chat.completions.with_raw_response.create(
        model=traced.service.tuned,
        messages=PROMPT,
        max_tokens=6,
        seed=3,
        extra_body={"ignore_eos": True},
        extra_headers=SAMPLED,
    )
    spans = traced.spans()
    (server,) = of(spans, "POST /v1/chat/completions")
    context = server.get_span_context()
    assert context is not None and server.parent is not None
    assert f"{context.trace_id:032x}" == TRACE == answer.headers["x-trace-id"]
    assert f"{server.parent.span_id:016x}" == PARENT and server.kind is SpanKind.SERVER
    completion = answer.parse()
    assert completion.usage is not None
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": traced.service.tuned,
        "gen_ai.response.model": traced.service.tuned,
        "gen_ai.response.id": completion.id,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.seed": 3,
        "gen_ai.usage.input_tokens": completion.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.response.finish_reasons": ("length",),
        "rootstock.adapter.digest": ADAPTER,
        "rootstock.tenant": traced.service.control.acme.id,
        "rootstock.request_id": answer.headers["x-request-id"],
        "rootstock.outcome": "success",
    }
    assert {name: attributes(server).get(name) for name in expected} == expected
    phases = sorted((span for span in spans if span is not server), key=lambda span: span.start_time or 0)
    assert [span.name for span in phases] == ["queue", "adapter_load", "prefill", "decode"]
    times = [(span.start_time or 0, span.end_time or 0) for span in phases]
    assert all(before[1] == after[0] for before, after in pairwise(times))
    assert (server.start_time or 0) <= times[0][0] and times[-1][1] <= (server.end_time or 0)
    assert all(span.parent is not None and span.parent.span_id == context.span_id for span in phases)
    assert attributes(phases[-1])["gen_ai.usage.output_tokens"] == 6


def test_no_span_carries_text_of_the_prompt_or_the_answer(traced: Traced) -> None:
    answer = traced.service.client().chat.completions.create(
        model="tiny", messages=PROMPT, max_tokens=12, stop=["unheard"], user="quincy", seed=1
    )
    told = " ".join(span.to_json() for span in traced.spans())
    assert "quinces" not in told and "unheard" not in told and "quincy" not in told
    assert traced.service.key not in told
    assert answer.choices[0].message.content and answer.choices[0].message.content not in told


def test_each_choice_of_a_stream_has_its_phases_and_the_prompt_counts_once(traced: Traced) -> None:
    chunks = traced.service.client().chat.completions.create(
        model="tiny",
        messages=PROMPT,
        n=2,
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    usage = [chunk.usage for chunk in chunks][-1]
    spans = traced.spans()
    (server,) = of(spans, "POST /v1/chat/completions")
    assert {attributes(span)["rootstock.sequence.index"] for span in of(spans, "decode")} == {0, 1}
    assert usage is not None and attributes(server)["gen_ai.usage.input_tokens"] == usage.prompt_tokens
    assert attributes(server)["gen_ai.usage.output_tokens"] == usage.completion_tokens == 8
    assert attributes(server)["gen_ai.request.choice.count"] == 2


def test_an_embedding_has_no_decode_and_a_request_that_asks_no_engine_no_phases(traced: Traced) -> None:
    traced.service.client().embeddings.create(model="tiny", input=["one", "two words"], encoding_format="float")
    spans = traced.spans()
    (server,) = of(spans, "POST /v1/embeddings")
    assert attributes(server)["gen_ai.operation.name"] == "embeddings"
    assert len(of(spans, "prefill")) == 2 and not of(spans, "decode")
    traced.service.client().models.list()
    assert [span.name for span in traced.spans()] == ["GET /v1/models"]


def test_a_refusal_is_traced_as_what_it_is_and_is_no_error_of_the_service(traced: Traced) -> None:
    refused = traced.service.http().post("/v1/chat/completions", json={"model": "missing", "messages": PROMPT})
    (server,) = traced.spans()
    assert attributes(server)["http.response.status_code"] == refused.status_code == 404
    assert attributes(server)["rootstock.outcome"] == "rejected" and server.status.status_code is StatusCode.UNSET


def test_a_caller_that_does_not_sample_gets_a_trace_id_and_no_spans(traced: Traced) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    assert traced.service.http().get("/v1/models", headers=headers).headers["x-trace-id"] == TRACE
    traced.service.http().get("/v1/files")
    assert [span.name for span in traced.spans()] == ["GET /v1/files"]


@pytest.mark.slow
def test_without_an_endpoint_no_library_is_loaded_and_the_trace_id_is_still_told(real_service: RealService) -> None:
    response = real_service.http().get("/v1/models", headers=SAMPLED)
    assert response.headers["x-trace-id"] == TRACE
    code = (
        "import sys, service.server, service.tuning_worker, service.app; from service.config import Settings;"
        "from service.tracing.configuration import open_traces; assert open_traces(Settings(), 'api', {}) is None;"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("setting", "environ", "endpoint"),
    [
        (None, {}, None),
        ("http://c:4318/", {}, "http://c:4318/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://e:4318"}, "http://e:4318/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/own"}, "http://t/own"),
        ("http://c:4318", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/own"}, "http://c:4318/v1/traces"),
        ("http://c:4318", {"OTEL_SDK_DISABLED": "true"}, None),
        ("http://c:4318", {"OTEL_TRACES_EXPORTER": "none"}, None),
    ],
)
def test_the_setting_and_the_standard_variables_say_where_traces_go(
    setting: str | None, environ: dict[str, str], endpoint: str | None
) -> None:
    assert traces_endpoint(setting, environ) == endpoint


def test_another_protocol_and_an_endpoint_that_is_no_url_stop_the_start() -> None:
    with pytest.raises(SettingsError, match="OTEL_EXPORTER_OTLP_PROTOCOL=grpc"):
        open_traces(Settings(otlp_endpoint="http://c:4317"), "api", {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    with pytest.raises(SettingsError, match="--otlp-endpoint"):
        load_settings({"otlp_endpoint": "collector:4318"}, {})


@pytest.mark.parametrize(
    ("header", "trace_id"),
    [
        (f"00-{TRACE}-{PARENT}-01", TRACE),
        (f"01-{TRACE}-{PARENT}-01-later", TRACE),
        (f"00-{TRACE}-{PARENT}-01-later", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        ("", None),
        (None, None),
    ],
)
def test_a_traceparent_is_read_as_the_w3c_says(header: str | None, trace_id: str | None) -> None:
    assert trace_id_of(header) == trace_id


def test_a_sequence_that_never_started_only_queued_or_waited_for_its_adapter() -> None:
    assert [phase.name for phase in PhaseTimes().phases(1.0, None, 3.0)] == [PhaseName.QUEUE]
    waited = PhaseTimes(adapter_wanted=2.0).phases(1.0, None, 3.0)
    assert [(phase.name.value, phase.seconds) for phase in waited] == [("queue", 1.0), ("adapter_load", 1.0)]


@pytest.fixture
def claim(control: Control) -> Claim:
    control.create_job(control.acme)
    claim = control.queue.claim("worker")
    assert claim is not None
    return claim


def test_a_run_of_a_job_is_a_span_with_its_phases_and_its_steps_in_slices(
    claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr(time, "time_ns", lambda: int(now * 1e9))
    exporter = InMemorySpanExporter()
    trace = Traces(SimpleSpanProcessor(exporter), "engine").job(claim)
    with trace.phase("load_data"):
        now += 1
    with trace.training():
        for step in range(1, 100_001):
            now += 0.5
            trace.stepped(step, 10, float("nan") if step == 3 else 2.0)
    with pytest.raises(ValueError), trace.phase("evaluation"):
        raise ValueError("the words of a prompt")
    trace.ended("failed", failed=True)
    spans = list(exporter.get_finished_spans())
    slices = of(spans, "training_slice")
    assert 200 < len(slices) < 400, "a day's run has a few hundred"
    assert sum(attributes(span)["rootstock.training.tokens"] for span in slices) == 1_000_000
    assert attributes(slices[0])["rootstock.training.mean_loss"] == 2.0
    edges = [
        (attributes(s)["rootstock.training.first_step"], attributes(s)["rootstock.training.last_step"]) for s in slices
    ]
    assert edges[0][0] == 1 and edges[-1][1] == 100_000
    assert all(before[1] + 1 == after[0] for before, after in pairwise(edges))
    (run,) = of(spans, "fine_tuning_job")
    assert attributes(run)["rootstock.job_id"] == claim.job.id and run.status.status_code is StatusCode.ERROR
    assert attributes(of(spans, "evaluation")[0])["error.type"] == "ValueError"
    assert not any("words" in span.to_json() for span in spans)
    assert trace.log_ids == {"trace_id": f"{run.get_span_context().trace_id:032x}"}  # type: ignore[union-attr]


def test_an_untraced_run_costs_nothing_and_tells_nothing(claim: Claim) -> None:
    trace = JobTrace(claim)
    with trace.phase("load_data"), trace.training():
        trace.stepped(1, 10, 2.0)
    trace.ended("succeeded", failed=False)
    assert trace.log_ids == {}


@pytest.mark.slow
def test_closing_does_not_wait_for_a_collector_that_is_away(claim: Claim) -> None:
    traces = Traces.exported_to("http://127.0.0.1:9/v1/traces", "api")
    traces.job(claim).ended("succeeded", failed=False)
    began = time.monotonic()
    traces.close()
    assert time.monotonic() - began < 5
