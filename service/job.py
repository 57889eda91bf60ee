"""What a fine-tuning job is: what was asked, how far it got. Knows no SQL, no HTTP and no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

from adapters.assertions import Assertion
from adapters.gate import GatePolicy, GateVerdict
from adapters.scoring import TaskKind

Auto = Literal["auto"]


class Method(StrEnum):
    """OpenAI's words: by imitating answers, or by preferring one of two."""

    SUPERVISED = "supervised"
    DPO = "dpo"


class Preset(StrEnum):
    """How much a run spends; see `service.presets`."""

    LIGHT = "light"
    STANDARD = "standard"
    THOROUGH = "thorough"


class JobStatus(StrEnum):
    """OpenAI's words. VALIDATING_FILES is shown until the worker has read the files; it is never stored."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


class Directive(StrEnum):
    """What the worker should do next, as a heartbeat answers it."""

    CONTINUE = "continue"
    PAUSE = "pause"
    CANCEL = "cancel"


class EventLevel(StrEnum):
    INFO = "info"
    WARN = "warn"
    ERROR = "error"


class EventType(StrEnum):
    MESSAGE = "message"
    METRICS = "metrics"


@dataclass(frozen=True)
class Hyperparameters:
    """As requested; "auto" is kept, for the worker to resolve (see `service.presets`). The first three are OpenAI's.

    `eval_every` counts optimizer steps; `early_stopping_patience` counts evaluations without progress
    (None: never stop early). `learning_rate` and `learning_rate_multiplier` exclude each other; a `learning_rate` of
    "probe" is chosen by short runs. `beta` belongs to the method `dpo`, `kl_to_base` to `supervised`.
    """

    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"
    learning_rate: float | Auto | Literal["probe"] = "auto"
    lora_r: int | Auto = "auto"
    lora_alpha: float | Auto = "auto"
    lora_dropout: float | Auto = "auto"
    target_modules: tuple[str, ...] | Literal["auto", "all-linear"] = "auto"
    layers_to_transform: tuple[int, ...] | None = None
    use_rslora: bool = False
    schedule: Literal["auto", "linear", "cosine", "constant"] = "auto"
    warmup_ratio: float | Auto = "auto"
    weight_decay: float | Auto = "auto"
    kl_to_base: float | Auto = "auto"
    beta: float | Auto = "auto"
    activation_checkpointing: bool | Auto = "auto"
    eval_every: int | Auto = "auto"
    early_stopping_patience: int | Auto | None = "auto"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Hyperparameters:
        """From JSON values, where tuples have become lists."""
        plain: dict[str, Any] = dict(values)
        for name in ("target_modules", "layers_to_transform"):
            if isinstance(plain[name], list):
                plain[name] = tuple(plain[name])
        return cls(**plain)


@dataclass(frozen=True)
class EvaluationSpec:
    """How the candidate is compared before publication. `file` replaces the held-out examples; `task` None: told by
    the expected answers; `max_seconds` bounds the comparison, not the training."""

    file: str | None = None
    max_examples: int = 200
    max_seconds: float = 180.0
    num_shots: int = 8
    task: TaskKind | None = None
    assertions: tuple[Assertion, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvaluationSpec:
        task = values.get("task")
        return cls(
            **{
                **values,
                "task": None if task is None else TaskKind(task),
                "assertions": tuple(Assertion(**assertion) for assertion in values.get("assertions", ())),
            }
        )


@dataclass(frozen=True)
class GateDecision:
    """What the gate said, and which model of the alias the candidate was compared with (None: there was none)."""

    verdict: GateVerdict
    compared_with: str | None


@dataclass(frozen=True)
class JobSpec:
    """What was asked for. `model` is the id as requested; `parent_digest` the adapter it resolved to, if any.

    `alias` (an extension) names the alias that moves to the new version in the transaction that succeeds, if it passes
    `gate`: the tenant's policy when the job was made, with what the job asked for otherwise. `strict` (another) stops
    the job when the data report has errors.
    """

    model: str
    base_model: str
    training_file: str
    seed: int
    validation_file: str | None = None
    parent_digest: str | None = None
    suffix: str | None = None
    method: Method = Method.SUPERVISED
    preset: Preset = Preset.STANDARD
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    metadata: Mapping[str, str] | None = None
    alias: str | None = None
    strict: bool = False
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    gate: GatePolicy = field(default_factory=GatePolicy)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> JobSpec:
        return cls(
            **{
                **values,
                "method": Method(values["method"]),
                "preset": Preset(values["preset"]),
                "hyperparameters": Hyperparameters.from_dict(values["hyperparameters"]),
                "evaluation": EvaluationSpec.from_dict(values.get("evaluation", {})),
                "gate": GatePolicy.from_dict(values.get("gate", {})),
            }
        )


@dataclass(frozen=True)
class JobError:
    """Why a job failed; OpenAI's three fields."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Job:
    """One row. Times are unix seconds by the database's clock.

    `resolved` holds the hyperparameters that replaced "auto"; `resume_point` is the worker's own opaque
    reference to its last resumable training state (see `JobQueue.save_resume_point`); `estimate` what the run was
    predicted to take and, once it is over, what it took (see `service.tuning_estimate`).
    """

    id: str
    tenant_id: str
    tenant_name: str
    spec: JobSpec
    state: JobStatus
    files_validated: bool
    paused: bool
    attempt: int
    created_at: float
    finished_at: float | None = None
    estimated_finish: float | None = None
    trained_tokens: int | None = None
    resolved: Mapping[str, Any] | None = None
    fine_tuned_model: str | None = None
    result_files: tuple[str, ...] = ()
    error: JobError | None = None
    resume_point: str | None = None
    estimate: Mapping[str, Any] | None = None

    @property
    def status(self) -> JobStatus:
        """What a client sees: a paused job reads "queued", an unread file "validating_files"."""
        if self.state.final:
            return self.state
        if not self.files_validated and not self.paused:
            return JobStatus.VALIDATING_FILES
        return JobStatus.QUEUED if self.paused else self.state

    @property
    def model_id(self) -> str:
        """The id that the fine-tuned model gets: `ft:{base}:{tenant}:{suffix}:{job short id}`."""
        short = self.id.removeprefix("ftjob-")[:8]
        return f"ft:{self.spec.base_model}:{self.tenant_name}:{self.spec.suffix or ''}:{short}"

    def checkpoint_model_id(self, step: int) -> str:
        return f"{self.model_id}:ckpt-step-{step}"


@dataclass(frozen=True)
class Event:
    id: str
    job_id: str
    created_at: float
    level: EventLevel
    type: EventType
    message: str
    data: Mapping[str, Any] | None


@dataclass(frozen=True)
class Checkpoint:
    """A servable snapshot: `model_id` is `…:ckpt-step-N`, `digest` its adapter in the store."""

    id: str
    job_id: str
    created_at: float
    step: int
    model_id: str
    digest: str
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class Claim:
    """A worker's right to a job: valid while the row still carries this `attempt` and runs.

    `job` is the row at claim time: `job.files_validated` says whether validation is done,
    `job.resume_point` where to resume.
    """

    job: Job
    attempt: int
    worker: str
    lease_seconds: float
