"""Every setting, documented once, where it is defined. Knows how to read them, not what they do.

Each field is `--field-name` of `rootstock serve` and `ROOTSTOCK_FIELD_NAME` in the environment;
the flag wins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import ByteSize, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "ROOTSTOCK_"
CLIENT_VARIABLES = frozenset({"ROOTSTOCK_URL", "ROOTSTOCK_API_KEY"})
"""Read by the client commands of the command line, not by the service."""

TEST_PREFIX = "ROOTSTOCK_TEST_"
"""Read by the tests."""

BUNDLED_BASE = Path(__file__).resolve().parent.parent / "bases" / "tiny"

MIB = 1024 * 1024


class SettingsError(Exception):
    """A setting is wrong or unknown; the message names each one and the way out."""


class Settings(BaseSettings):
    """What the operator chose. Frozen: nothing changes a setting while the service runs."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    host: str = Field("127.0.0.1", description="Address both ports listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port of the API; 0 takes a free one.")
    ops_port: int = Field(
        9400, ge=0, le=65535, description="Port of /metrics, /livez and /readyz, for the cluster only."
    )
    admin_key: SecretStr | None = Field(
        None, description="Bearer key of /v1/admin; unset, one is made and printed once at start."
    )

    base: str = Field(str(BUNDLED_BASE), description="Base model: a local directory or a hub id.")
    base_name: str | None = Field(None, description="Model id clients see for the base; unset, the base decides.")
    quantization: Literal["nf4", "int8", "none"] = Field("nf4", description="How the base is held in memory.")
    device: str | None = Field(None, description="cpu, cuda, cuda:1 …; unset, CUDA when there is one.")
    max_model_len: int | None = Field(
        None, ge=16, description="Longest prompt + answer in tokens; unset, the base's own limit."
    )

    data_dir: Path = Field(Path("rootstock-data"), description="Where database, files and adapters live.")
    database_url: str | None = Field(
        None, description="SQLAlchemy URL (SQLite or Postgres); unset, SQLite in the data directory."
    )
    storage_url: str | None = Field(
        None, description="fsspec URL of files and adapters; unset, a folder of the data directory."
    )

    max_num_seqs: int = Field(32, ge=1, description="Sequences decoded together.")
    max_num_batched_tokens: int = Field(512, ge=1, description="Tokens of one engine step, prefill included.")
    prefill_chunk: int = Field(128, ge=1, description="Tokens of one prompt computed in one step.")
    kv_cache_bytes: ByteSize = Field(
        ByteSize(512 * MIB), ge=MIB, description="Memory for keys and values, e.g. 512MiB."
    )
    prefix_cache: Literal["tenant", "shared", "off"] = Field(
        "tenant",
        description="Who may reuse computed prompt beginnings: the same tenant, all tenants (one can then tell by the"
        " response time that another asked the same), nobody.",
    )
    max_lora_slots: int = Field(32, ge=1, description="Adapters resident on the device at once.")
    max_lora_rank: int = Field(64, ge=1, le=1024, description="Largest adapter rank accepted.")
    max_host_adapters: int = Field(256, ge=1, description="Adapters kept in host memory, ready for a slot.")
    host_adapter_bytes: ByteSize = Field(
        ByteSize(4096 * MIB), ge=MIB, description="Host memory for them, whatever their number; at least one is kept."
    )
    max_waiting: int = Field(
        1024, ge=1, description="Requests that may wait; one tenant alone fills half of it, then gets a 429."
    )

    request_timeout_seconds: float | None = Field(
        None, gt=0, description="Longest a request may wait and run; a request's own `timeout` may be shorter."
    )

    cuda_graphs: bool = Field(
        True, description="Replay decode steps as CUDA graphs, recorded when first needed; without effect on CPU."
    )

    engine_process: bool = Field(
        True,
        description="Run the engine and training in a process of their own, so that HTTP and decoding never wait for"
        " each other; off: as threads of the API's process.",
    )
    training: bool = Field(True, description="Run fine-tuning jobs beside the engine.")
    itl_target_ms: float | None = Field(
        None,
        gt=0.0,
        allow_inf_nan=False,
        description="Milliseconds between two tokens (99th percentile) that training must not spoil: it is held back"
        " while answers are written slower than that. Unset, thread and stream priorities alone arbitrate.",
    )
    training_share: float = Field(
        1.0,
        ge=0.0,
        le=1.0,
        description="Largest share of the time in which answers are being written that training may run; 0: only"
        " while nobody waits for one.",
    )
    training_jobs: int = Field(
        4, ge=1, le=64, description="Jobs trained at once, their small batches together; more memory, less waiting."
    )
    lease_seconds: float = Field(
        30.0, ge=1.0, le=3600.0, description="A job whose worker is silent for so long may be claimed again."
    )

    resume_point_seconds: float = Field(
        30.0, ge=0.0, description="How often a running job saves the state that a restart goes on from."
    )

    completion_retention_days: float = Field(
        30.0,
        ge=0.0,
        description="How long feedback may refer to an answer: its id and model are kept, no text. 0: never.",
    )
    max_completion_records: int = Field(
        1_000_000, ge=1, description="Answers remembered for feedback at most; the oldest are dropped first."
    )
    feedback_retention_days: float = Field(365.0, gt=0.0, description="How long feedback itself is kept.")
    capture_bytes: ByteSize = Field(
        ByteSize(64 * MIB), ge=1024, description="Prompts and answers kept of a tenant that consents; oldest go first."
    )
    retraining_cooldown_hours: float = Field(
        24.0,
        ge=0.0,
        description="Shortest time between two retrainings that start by themselves, of one alias or model.",
    )
    merge_bytes: ByteSize = Field(
        ByteSize(32 * 1024 * MIB), ge=0, description="Disk for merged models in the data directory; 0: no merging."
    )
    merge_seconds: float = Field(24 * 3600.0, ge=60.0, description="How long a merged model can be downloaded.")

    gc_hours: float = Field(
        6.0, ge=0.0, description="How often storage that no row needs is swept away; 0: only by `rootstock gc`."
    )
    gc_grace_hours: float = Field(
        24.0, ge=1.0, description="Only what is older is swept: longer than any job's evaluation and publishing."
    )
    scrub_hours: float = Field(
        24.0, ge=0.0, description="How often all stored adapters are verified at rest; 0: only when they are loaded."
    )
    scrub_bytes_per_second: ByteSize = Field(
        ByteSize(8 * MIB), ge=1024, description="How fast they are read for that, at most."
    )

    drift: bool = Field(True, description="Watch the traffic of each adapter for drift, behind everybody's requests.")
    drift_run_length: float = Field(
        5000.0,
        ge=500.0,
        le=10_000_000.0,
        description="Observations of an adapter's traffic until a false alarm is to be expected; smaller finds sooner."
        " Of references it is what they are made with.",
    )
    drift_webhook_url: SecretStr | None = Field(
        None, description="http(s) URL that drift's events are posted to, of all tenants; needs the secret."
    )
    drift_webhook_secret: SecretStr | None = Field(
        None, min_length=16, description="Key that signs them (HMAC-SHA256)."
    )

    max_body_bytes: ByteSize = Field(ByteSize(8 * MIB), ge=1024, description="Largest JSON request body.")
    max_file_bytes: ByteSize = Field(ByteSize(512 * MIB), ge=1024, description="Largest uploaded file.")
    drain_seconds: float = Field(
        30.0, ge=0.0, le=3600.0, description="How long running answers may take to finish after SIGTERM."
    )
    stall_seconds: float = Field(
        60.0, ge=1.0, description="/livez fails when there is work but no engine step for so long."
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s/]+",
        description="Base URL of an OpenTelemetry collector (OTLP over HTTP), e.g. http://collector:4318, for traces of"
        " requests and jobs; unset, OTEL_EXPORTER_OTLP_ENDPOINT decides, and without that there are none.",
    )
    router_aliases: bool = Field(False, description="Also export the vllm:* names that inference routers scrape.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people or for machines.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        needed = self.max_num_seqs + self.prefill_chunk
        if self.max_num_batched_tokens < needed:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is too small: a step holds a token for each of"
                f" max_num_seqs={self.max_num_seqs} and one prefill_chunk={self.prefill_chunk}, so it must be at least"
                f" {needed}"
            )
        if self.port == self.ops_port and self.port != 0:
            raise ValueError("port and ops_port must differ")
        if (self.drift_webhook_url is None) != (self.drift_webhook_secret is None):
            raise ValueError("drift_webhook_url and drift_webhook_secret belong together: set both or none")
        if self.drift_webhook_url is not None and not _is_web_url(self.drift_webhook_url.get_secret_value()):
            raise ValueError("drift_webhook_url must be an http:// or https:// URL with a host")
        return self

    @property
    def resolved_database_url(self) -> str:
        """The database URL with the default filled in."""
        return self.database_url or f"sqlite:///{self.data_dir.resolve() / 'rootstock.db'}"

    @property
    def resolved_storage_url(self) -> str:
        """The storage URL with the default filled in."""
        return self.storage_url or str(self.data_dir.resolve() / "storage")


def load_settings(overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment, `overrides` winning. Raises SettingsError naming what is wrong."""
    unknown = _unknown_variables(os.environ if environ is None else environ)
    if unknown:
        raise SettingsError("\n".join(unknown))
    try:
        return Settings(**(overrides or {}))
    except ValidationError as error:
        raise SettingsError("\n".join(_complaints(error))) from None


def _is_web_url(text: str) -> bool:
    url = urlsplit(text)
    return url.scheme in ("http", "https") and bool(url.hostname)


def _complaints(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors(include_input=False, include_url=False):
        name = "_".join(str(part) for part in item["loc"])
        where = f"--{name.replace('_', '-')} ({PREFIX}{name.upper()}): " if name else ""
        lines.append(where + item["msg"].removeprefix("Value error, "))
    return lines


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    lines = []
    for name in sorted(environ):
        if not name.upper().startswith(PREFIX) or name.upper().startswith(TEST_PREFIX):
            continue
        if name.upper() in known | CLIENT_VARIABLES:
            continue
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see `rootstock serve --help`"
        if "_TCP" in name or "_SERVICE_" in name:
            hint = "Kubernetes made it for a Service; set enableServiceLinks: false in the pod"
        lines.append(f"{name} is not a setting: {hint}")
    return lines
