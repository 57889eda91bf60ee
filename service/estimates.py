"""What a job would take, before there is one. Reads its files and makes its plan; knows no HTTP and trains nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from adapters.corpus import Codec
from adapters.errors import AdapterFormatError, TrainingError
from adapters.estimate import Estimate, RunSize, estimate, peak_memory_bytes
from adapters.lora_weights import BaseSignature, LoraSpec
from adapters.peft_format import read_adapter
from adapters.store import AdapterStore
from service.errors import DeadlineExceededError, InvalidRequestError, RateLimitError, UnavailableError
from service.files import Files
from service.job import JobSpec
from service.jobs import Jobs
from service.tuning_data import JobFiles, TuningData
from service.tuning_plan import TuningPlan, make_plan

MAX_AT_ONCE = 2
LIMIT_SECONDS = 120.0


class EstimatedBase(Codec, Protocol):
    """What an estimate needs of the base: its description, no weight."""

    @property
    def identity(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def activation_bytes(self) -> int: ...
    @property
    def signature(self) -> BaseSignature: ...


@dataclass(frozen=True)
class AskedJob:
    """A job that nobody made."""

    tenant_id: str
    spec: JobSpec


@dataclass(frozen=True)
class JobEstimate:
    """`resolved` are the hyperparameters that would stand for "auto"."""

    estimate: Estimate
    resolved: Mapping[str, Any]
    num_train: int
    num_valid: int

    def as_dict(self) -> dict[str, Any]:
        """As the API writes it and rows keep it."""
        found = self.estimate
        return {
            "tokens": found.tokens,
            "steps": found.steps,
            "evaluations": found.evaluations,
            "probe_steps": found.probe_steps,
            "seconds": found.seconds,
            "peak_memory_bytes": found.peak_memory_bytes,
            "training_examples": self.num_train,
            "validation_examples": self.num_valid,
            "hyperparameters": dict(self.resolved),
        }


class Estimates:
    """At most one at a time for a tenant, and few in all: each tokenizes a whole file."""

    def __init__(
        self,
        files: Files,
        store: AdapterStore,
        jobs: Jobs,
        base: EstimatedBase,
        *,
        max_rank: int,
        limit_seconds: float = LIMIT_SECONDS,
    ) -> None:
        self._files = files
        self._store = store
        self._jobs = jobs
        self._base = base
        self._max_rank = max_rank
        self._limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._busy: set[str] = set()

    def make(self, tenant_id: str, spec: JobSpec) -> JobEstimate:
        """Raises what the job would end with when its files or hyperparameters are wrong.

        Raises RateLimitError while another one of this tenant is made, UnavailableError while many are, and
        DeadlineExceededError when reading the files takes too long.
        """
        self._jobs.check(tenant_id, spec)
        with self._seat(tenant_id):
            data = JobFiles(
                self._files, AskedJob(tenant_id, spec), self._base, self._base.max_model_len, self._deadline()
            ).load()
        base = self._base
        plan = self._plan(spec, data)
        size = RunSize.of(plan.config, data.train, data.valid, probes=plan.probes)
        memory = peak_memory_bytes(
            size,
            plan.spec,
            base.signature,
            vocabulary=base.vocab_size,
            activation_bytes=base.activation_bytes,
            recompute=plan.config.recompute_layers is True,
        )
        found = estimate(size, memory, tokens_per_second=self._jobs.tokens_per_second(base.identity))
        return JobEstimate(found, plan.resolved, data.num_train, data.num_valid)

    @contextmanager
    def _seat(self, tenant_id: str) -> Iterator[None]:
        with self._lock:
            if tenant_id in self._busy:
                raise RateLimitError("An estimate of yours is being made: wait for it.")
            if len(self._busy) >= MAX_AT_ONCE:
                raise UnavailableError("Too many estimates are being made.", retry_after=5.0)
            self._busy.add(tenant_id)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(tenant_id)

    def _plan(self, spec: JobSpec, data: TuningData) -> TuningPlan:
        """Raises InvalidRequestError where the job would fail at its start."""
        try:
            plan = make_plan(
                spec,
                num_examples=data.num_train,
                num_valid=data.num_valid,
                base=self._base.signature,
                max_rank=self._max_rank,
                parent=self._parent(spec),
            )
            plan.spec.matching(self._base.signature)
        except (AdapterFormatError, TrainingError) as error:
            raise InvalidRequestError(error.message, param=error.param or "hyperparameters", code=error.code) from error
        return plan

    def _parent(self, spec: JobSpec) -> LoraSpec | None:
        if spec.parent_digest is None:
            return None
        files = self._store.read(spec.parent_digest)
        return read_adapter(files, self._base.signature, max_rank=self._max_rank).spec

    def _deadline(self) -> Callable[[], None]:
        end = time.monotonic() + self._limit_seconds

        def check() -> None:
            if time.monotonic() > end:
                raise DeadlineExceededError(
                    f"The file was not read within {self._limit_seconds:g} seconds: estimate a part of it.",
                    code="estimate_timeout",
                )

        return check
