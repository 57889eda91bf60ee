"""Whether traces are wanted and where they go: our setting, and OpenTelemetry's own variables. Loads no library.

https://opentelemetry.io/docs/specs/otel/protocol/exporter/
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from service.config import Settings, SettingsError

if TYPE_CHECKING:
    from service.tracing.traces import Traces

PROTOCOL = "http/protobuf"
_TRACES_PATH = "v1/traces"


def open_traces(settings: Settings, process: str, environ: Mapping[str, str] = os.environ) -> Traces | None:
    """The traces of this process (`api` or `engine`); None when they are off, and then nothing is loaded.

    Raises SettingsError for a protocol that the service does not speak.
    """
    endpoint = traces_endpoint(settings.otlp_endpoint, environ)
    if endpoint is None:
        return None
    from service.tracing.traces import Traces

    return Traces.exported_to(endpoint, process)


def traces_endpoint(setting: str | None, environ: Mapping[str, str]) -> str | None:
    """The full URL, or None. Our setting goes before OTEL_EXPORTER_OTLP_*; what switches traces off, before all.

    Raises SettingsError.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    base = setting or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    own = None if setting else environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not (base or own):
        return None
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if environ.get(name, PROTOCOL) != PROTOCOL:
            raise SettingsError(f"{name}={environ[name]}: traces are sent as {PROTOCOL} only; unset it")
    return own or f"{str(base).removesuffix('/')}/{_TRACES_PATH}"
