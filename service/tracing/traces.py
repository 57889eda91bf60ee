"""Makes the traces of one process and sends them off. Knows OpenTelemetry's SDK, not what a trace is about.

No global provider: two services in one process trace apart. Spans leave by a thread of the SDK's, in batches.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.job import Claim
from service.tracing.job_trace import JobTrace
from service.tracing.request_trace import RequestTrace

FLUSH_SECONDS = 3.0
"""What closing may take: a collector that is away must not keep the service from ending."""


class Traces:
    """Requests' and jobs'."""

    def __init__(self, processor: SpanProcessor, process: str) -> None:
        resource = Resource.create({SERVICE_VERSION: version("rootstock"), "rootstock.process": process})
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # OTEL_SERVICE_NAME is not set
            resource = resource.merge(Resource({SERVICE_NAME: "rootstock"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("rootstock")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def exported_to(cls, endpoint: str, process: str) -> Traces:
        """Sent by OTLP over HTTP; OTEL_EXPORTER_OTLP_* (headers, timeout, …) and OTEL_BSP_* are the SDK's to obey."""
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)), process)

    def request(self, method: str, path: str, headers: Mapping[str, str]) -> RequestTrace:
        """Of a request that has just arrived; a child of the caller's span where `headers` name one."""
        parent = self._propagator.extract({name: headers[name] for name in self._propagator.fields if name in headers})
        return RequestTrace(self._tracer, parent, method, path)

    def job(self, claim: Claim) -> JobTrace:
        """Of a worker's run of a job, which begins now."""
        return JobTrace(claim, self._tracer)

    def close(self) -> None:
        """Send what is left, for FLUSH_SECONDS at most."""
        thread = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
        thread.start()
        thread.join(FLUSH_SECONDS)
