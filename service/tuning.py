"""Runs one claimed job: files -> trainer -> evaluation -> publish. Knows no threads and no leases.

Every write to the job is fenced by its claim; `check` (see `service.heartbeat`) ends a run from outside. A run that
stops early leaves a resume point from which the next attempt goes on as if nothing had happened.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from adapters.drift.reference import write_reference
from adapters.errors import AdapterError, StaleAdapterError, StoreError, TrainingError
from adapters.host_memory import give_back
from adapters.lora_weights import LoraWeights
from adapters.packed_loss import Score
from adapters.peft_format import read_adapter, write_adapter
from adapters.rate_probe import RateProbe
from adapters.recipe import TrainConfig, num_steps
from adapters.shared_forward import SharedForward
from adapters.steps import Reached, unwatched
from adapters.store import AdapterStore
from adapters.trainable import TrainableLora
from adapters.trainer import Trainer
from service.background_generation import Submitting
from service.database import AWAY
from service.drift_reference import MadeReference, TuningReference
from service.engine.base_model import BaseModel
from service.engine.errors import EngineError
from service.errors import ServiceError, UnavailableError
from service.files import FilePurpose, Files
from service.heartbeat import StopReason, StopRequested
from service.job import Claim, EventLevel, EventType
from service.job_queue import FencedWriteError, JobCancelledError, JobQueue
from service.job_report import report_events, report_on, strict_error
from service.resume_points import ResumePoints
from service.run_facts import facts_of_run
from service.tracing.job_trace import JobTrace
from service.tuning_data import JobFiles, TuningData
from service.tuning_estimate import EstimatedRun, comparison_message, estimate_message
from service.tuning_evaluation import Evaluated, TuningEvaluation
from service.tuning_plan import TuningPlan, make_plan
from service.tuning_report import probe_message, score_metrics, step_message, step_metrics, step_metrics_csv

if TYPE_CHECKING:
    from service.tracing.traces import Traces

logger = logging.getLogger(__name__)

T = TypeVar("T")

RESULTS = FilePurpose.FINE_TUNE_RESULTS
MAX_METRICS_EVENTS = 500
MAX_CHECKPOINTS = 10
RETRY_SECONDS = 0.5
"""Between two attempts to write what storage or database did not take."""


class Outcome(StrEnum):
    """How a worker's run of a job ended; the `outcome` label of its metrics."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"
    INTERRUPTED = "interrupted"
    """The database was away; the job was given back as far as it had got."""
    LOST = "lost"


class TuningObserver(Protocol):
    """Who counts."""

    def job_run_finished(self, outcome: str, seconds: float) -> None: ...

    def tokens_trained(self, num_tokens: int) -> None: ...


@dataclass(frozen=True)
class TuningServices:
    """What a run works with."""

    queue: JobQueue
    files: Files
    store: AdapterStore
    resume_points: ResumePoints
    base: BaseModel
    engine: Submitting
    observer: TuningObserver
    max_lora_rank: int
    save_every_seconds: float = 30.0
    """Between two resume points; what a crash can cost."""
    storage_patience_seconds: float = 600.0
    """For how long a store that takes no adapter (a full disk, say) is asked again before the job fails."""
    shared: SharedForward | None = None
    """Of all jobs that train at once; None: each forwards for itself."""
    drift_run_length: float | None = None
    """What drift references promise; None: adapters are published without one."""
    traces: Traces | None = None
    reached: Reached = unwatched


class TuningRun:
    """One attempt at one job."""

    def __init__(
        self, services: TuningServices, claim: Claim, check: Callable[[], None], trace: JobTrace | None = None
    ) -> None:
        self._services = services
        self._trace = trace or JobTrace(claim)
        self._claim = claim
        self._check = check
        self._job = claim.job
        self._trainer: Trainer | None = None
        self._probe: RateProbe | None = None
        self._facts: Mapping[str, Any] | None = None
        self._saved_at = time.monotonic()
        self._num_reported = 0
        self._published: list[str] = []

    def execute(self) -> Outcome:
        """Bring the job to an end, or give it back. Whatever goes wrong ends here, in the job's row or the log."""
        try:
            self._run()
            outcome = Outcome.SUCCEEDED
        except StopRequested as stop:
            outcome = self._give_back(stop.reason)
        except JobCancelledError:
            outcome = Outcome.CANCELLED
        except FencedWriteError:
            logger.warning("tuning.claim_lost", extra=self._ids())
            outcome = Outcome.LOST
        except AWAY as error:
            logger.warning("tuning.database_away", extra={**self._ids(), "reason": type(error).__name__})
            outcome = self._await_database()
        except Exception as error:
            outcome = self._fail(error)
        if outcome in (Outcome.SUCCEEDED, Outcome.FAILED, Outcome.CANCELLED):
            self._services.resume_points.discard(self._job.id)
            self._services.reached("job.swept")
        if outcome in (Outcome.LOST, Outcome.CANCELLED):
            self._vanish_with_job()
        self._trainer = self._probe = None
        give_back()
        return outcome

    def _run(self) -> None:
        if self._job.spec.base_model != self._services.base.name:
            raise TrainingError(
                f"The job was made for the base '{self._job.spec.base_model}', and now "
                f"'{self._services.base.name}' is loaded: create it again",
                code="base_changed",
                param="model",
            )
        files = JobFiles(
            self._services.files, self._job, self._services.base, self._services.base.max_model_len, self._check
        )
        with self._trace.phase("load_data"):
            data = self._load(files)
        trainer = self._make_trainer(data)
        self._facts = facts_of_run(self._services.base, self._services.files, self._job, data, trainer)
        run = self._estimate(trainer)
        self._train(trainer, run)
        compared = self._compare(run)
        with self._trace.phase("drift_reference"):
            made = TuningReference(self._services, self._claim, self._check, self._say).make(files, data)
        self._services.reached("reference.made")
        digest = self._publish(trainer.best_weights(), made)
        with self._trace.phase("evaluation"):
            evaluated = TuningEvaluation(self._services, self._claim, self._check, self._say).run(
                trainer, files, data, digest
            )
        self._services.reached("evaluation.done")
        with self._trace.phase("publish"):
            self._succeed(trainer, digest, evaluated, compared, made)

    # -- the phases -------------------------------------------------------------------------------------------

    def _load(self, files: JobFiles) -> TuningData:
        if not self._job.files_validated:
            self._say(f"Validating training file: {self._job.spec.training_file}")
            if self._job.spec.validation_file:
                self._say(f"Validating validation file: {self._job.spec.validation_file}")
            self._report_on_data()
        data = files.load()
        self._services.reached("data.read")
        if not self._job.files_validated:
            self._services.queue.files_validated(self._claim)
            self._services.reached("data.validated")
            self._say("Fine-tuning job started")
            self._say(data.describe())
        return data

    def _report_on_data(self) -> None:
        """What is wrong with the files. Advice, and no reason to fail, unless the job is strict."""
        strict = self._job.spec.strict
        try:
            report = report_on(self._services.files, self._job, self._services.base, self._check)
        except Exception:
            if strict:
                raise
            logger.exception("tuning.report_failed", extra=self._ids())
            self._say("The data report could not be made", EventLevel.WARN)
            return
        self._services.queue.save_data_report(self._claim, report.as_dict())
        for event in report_events(report):
            self._say(event.message, event.level, data=event.data)
        error = strict_error(report) if strict else None
        if error is not None:
            raise error

    def _make_trainer(self, data: TuningData) -> Trainer:
        """The trainer as it starts, or as the last attempt left it."""
        base, spec, parent = self._services.base, self._job.spec, self._parent_weights()
        plan = make_plan(
            spec,
            num_examples=data.num_train,
            num_valid=data.num_valid,
            base=base.signature,
            max_rank=self._services.max_lora_rank,
            parent=parent.spec if parent else None,
        )

        def make(config: TrainConfig, max_valid: int | None = None) -> Trainer:
            adapter = TrainableLora(plan.spec, base.signature, seed=spec.seed, device=base.device)
            if parent:
                adapter.load(parent.modules)
            valid = data.valid if max_valid is None else data.valid.first(max_valid)
            return Trainer(base.model, adapter, data.train, valid, config, self._services.shared)

        saved = self._saved_state()
        self._services.queue.progress(self._claim, resolved=plan.resolved)
        if plan.probes:
            plan = self._probe_rates(plan, RateProbe(make, plan.config, num_steps(plan.config, data.num_train)), saved)
        trainer = self._trainer = make(plan.config)
        if self._probe is not None:
            trainer.objective.load_state_dict(self._probe.prepared)
        if saved.get("trainer"):
            trainer.load_state_dict(saved["trainer"])
            self._say(f"Resuming from step {trainer.steps_done}")
        self._num_reported = trainer.steps_done - trainer.evaluation_due
        return trainer

    def _probe_rates(self, plan: TuningPlan, probe: RateProbe, saved: Mapping[str, Any]) -> TuningPlan:
        """Three short runs decide on the learning rate."""
        self._probe = probe
        if saved.get("probe"):
            probe.load_state_dict(saved["probe"])
        elif not probe.losses:
            rates = ", ".join(f"{rate:.2g}" for rate in probe.rates)
            self._say(f"Trying the learning rates {rates}, {probe.num_steps} steps each")
        while not probe.done:
            probe.step(self._check)
            self._save_when_due()
        result = probe.result()
        plan = plan.probed(result)
        if not saved.get("trainer"):
            self._say(probe_message(result), data=plan.resolved["learning_rate_probe"])
        self._services.queue.progress(self._claim, resolved=plan.resolved)
        return plan

    def _saved_state(self) -> dict[str, Any]:
        """What the last attempt left; empty where there is nothing, or nothing that can be read."""
        if not self._job.resume_point:
            return {}
        try:
            saved = self._services.resume_points.load(self._job.resume_point)
            if saved.get("base") != self._services.base.identity:
                raise StoreError("the base was changed since its training state was saved")
            return saved
        except StoreError as error:
            self._say(f"Starting over: {error.message}", EventLevel.WARN)
            return {}

    def _estimate(self, trainer: Trainer) -> EstimatedRun:
        """What the run will take, told and kept; an earlier attempt's prediction stands."""
        base, queue, before = self._services.base, self._services.queue, self._job.estimate
        run = EstimatedRun(trainer, base, before["predicted"] if before else None)
        found = run.predict(self._check, probed=self._probe is not None)
        if found is not None and before is None:
            kept = {"predicted": found.as_dict(), "actual": None}
            queue.progress(self._claim, estimate=kept, estimated_finish=_finish(run))
            self._say(estimate_message(found), data=found.as_dict())
        return run

    def _train(self, trainer: Trainer, run: EstimatedRun) -> None:
        with self._trace.training():
            self._take_steps(trainer, run)
        if trainer.stopped_early:
            self._say(f"Stopped early: no better validation loss since step {trainer.best_step}")

    def _take_steps(self, trainer: Trainer, run: EstimatedRun) -> None:
        while True:
            score = None
            if trainer.evaluation_due:
                with run.evaluating():
                    score = trainer.evaluate(self._check)
                self._services.reached("train.evaluated")
            self._report(trainer, score, run)
            if trainer.done:
                break
            self._save_when_due()
            with run.stepping():
                result = trainer.step(self._check)
            self._services.reached("train.stepped")
            self._services.observer.tokens_trained(result.num_tokens)
            self._trace.stepped(result.step, result.num_tokens, result.loss)

    def _compare(self, run: EstimatedRun) -> dict[str, Any]:
        """The estimate beside the truth."""
        compared = run.compared()
        self._services.queue.progress(self._claim, estimate=compared, tokens_per_second=run.tokens_per_second)
        self._say(comparison_message(compared), data=compared)
        return compared

    def _publish(self, weights: LoraWeights, made: MadeReference | None = None) -> str:
        """The adapter's digest; its files are durable in the store, but no name points at them yet."""
        return self._insist("adapter", lambda: self._store(weights, made))

    def _store(self, weights: LoraWeights, made: MadeReference | None) -> str:
        base = self._services.base
        with tempfile.TemporaryDirectory(prefix="rootstock-adapter-") as directory:
            write_adapter(Path(directory), weights, base_name=base.name, base=base.signature)
            if made is not None:
                write_reference(Path(directory), made.reference)
            digest = self._services.store.publish(Path(directory))
        self._published.append(digest)
        return digest

    def _keep_stored(self, digest: str, weights: LoraWeights, made: MadeReference | None) -> None:
        """The same adapter may have been published, deleted and swept away under another name meanwhile."""
        if not self._services.store.touch(digest):
            self._publish(weights, made)

    def _succeed(
        self,
        trainer: Trainer,
        digest: str,
        evaluated: Evaluated,
        compared: Mapping[str, Any],
        made: MadeReference | None,
    ) -> None:
        services = self._services
        contents = {"step_metrics.csv": step_metrics_csv(trainer)}
        if evaluated.report is not None:
            contents["evaluation.jsonl"] = evaluated.report.table()
        tables = [
            self._insist("results", partial(services.files.stage, self._job.tenant_id, name, RESULTS, [content]))
            for name, content in contents.items()
        ]
        services.reached("results.staged")
        metrics = {
            **score_metrics(trainer.scores[trainer.best_step] if trainer.best_step else None),
            "best_step": trainer.best_step,
            "evaluation": evaluated.as_dict(),
            "estimate": dict(compared),
            "drift_reference": None if made is None else made.as_dict(),
        }
        self._keep_stored(digest, trainer.best_weights(), made)  # the evaluation may have taken longer than the grace
        try:
            services.queue.succeed(
                self._claim,
                digest=digest,
                base_fingerprint=services.base.identity,
                metrics=metrics,
                trained_tokens=trainer.trained_tokens,
                result_files=tables,
                gate=evaluated.decision,
                provenance=self._facts,
            )
        except FencedWriteError:
            services.files.discard([table.storage_key for table in tables])
            raise
        self._keep_stored(digest, trainer.best_weights(), made)
        logger.info("tuning.succeeded", extra={**self._ids(), "digest": digest, "steps": trainer.steps_done})

    # -- what the client sees of it ---------------------------------------------------------------------------

    def _report(self, trainer: Trainer, score: Score | None, run: EstimatedRun) -> None:
        """Events, progress and checkpoints after a step (and its evaluation, where one was due)."""
        while trainer.incidents:
            self._say(trainer.incidents.pop(0), EventLevel.WARN)
        step = trainer.steps_done
        if step == self._num_reported:
            return
        self._num_reported = step
        ends_epoch = step % trainer.steps_per_epoch == 0
        every = ceil(trainer.num_steps / MAX_METRICS_EVENTS)
        if score is not None or step % every == 0 or trainer.done:
            metrics = step_metrics(trainer, trainer.history[-1], score, whole=ends_epoch or trainer.done)
            self._say(step_message(metrics), type=EventType.METRICS, data=metrics)
            self._services.queue.progress(
                self._claim, trained_tokens=trainer.trained_tokens, estimated_finish=_finish(run)
            )
        if ends_epoch and score is not None:
            self._checkpoint(trainer, score)

    def _checkpoint(self, trainer: Trainer, score: Score) -> None:
        """A servable snapshot at the end of an epoch, of at most MAX_CHECKPOINTS epochs."""
        epoch = trainer.steps_done // trainer.steps_per_epoch
        if epoch % ceil(trainer.config.num_epochs / MAX_CHECKPOINTS):
            return
        metrics = step_metrics(trainer, trainer.history[-1], score, whole=True)
        weights = trainer.adapter.weights()
        digest = self._publish(weights)
        self._services.queue.checkpoint(
            self._claim,
            step=trainer.steps_done,
            digest=digest,
            base_fingerprint=self._services.base.identity,
            metrics={name: value for name, value in metrics.items() if name != "total_steps"},
            provenance=self._facts,
        )
        self._keep_stored(digest, weights, None)
        self._services.reached("checkpoint.listed")
        self._say(f"Checkpoint created at step {trainer.steps_done}")

    def _say(
        self,
        message: str,
        level: EventLevel = EventLevel.INFO,
        type: EventType = EventType.MESSAGE,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self._services.queue.event(self._claim, message, level=level, type=type, data=data)

    # -- ends that are no success -----------------------------------------------------------------------------

    def _save_when_due(self) -> None:
        if time.monotonic() - self._saved_at > self._services.save_every_seconds:
            self._save_if_possible()

    def _save_if_possible(self) -> None:
        """A state that cannot be stored costs time after a crash, not the job."""
        try:
            self._save()
        except StoreError as error:
            logger.error("tuning.state_not_saved", extra={**self._ids(), "reason": error.message})
            self._saved_at = time.monotonic()

    def _insist(self, what: str, write: Callable[[], T]) -> T:
        """Storage that refuses is asked again for a while: what was learned is worth waiting for."""
        deadline = time.monotonic() + self._services.storage_patience_seconds
        refused = False
        while True:
            try:
                return write()
            except (OSError, StoreError, UnavailableError) as error:
                logger.error("tuning.storage_refuses", extra={**self._ids(), "what": what, "reason": str(error)})
                if time.monotonic() > deadline:
                    raise StoreError(f"The {what} could not be stored: {error}") from error
            if not refused:
                self._say(f"The {what} cannot be stored at the moment; it is tried again", EventLevel.WARN)
            refused = True
            self._check()
            time.sleep(RETRY_SECONDS)

    def _save(self) -> None:
        points = self._services.resume_points
        state = {
            "base": self._services.base.identity,
            "probe": self._probe.state_dict() if self._probe else None,
            "trainer": self._trainer.state_dict() if self._trainer else None,
        }
        reference = points.save(self._job.id, self._claim.attempt, state)
        self._services.reached("resume.written")
        trained = self._trainer.trained_tokens if self._trainer else None
        self._services.queue.save_resume_point(self._claim, reference, trained)
        self._services.reached("resume.referenced")
        points.discard(self._job.id, keep=reference)
        give_back()
        self._saved_at = time.monotonic()

    def _await_database(self) -> Outcome:
        """Keep what was learned until it can be written, or until the lease has run out without the database."""
        reason = StopReason.INTERRUPTED
        while True:
            try:
                return self._give_back(reason)
            except AWAY:
                time.sleep(RETRY_SECONDS)
            try:
                self._check()
            except StopRequested as stop:
                if stop.reason is StopReason.SHUTDOWN and reason is StopReason.SHUTDOWN:
                    return Outcome.LOST  # its lease runs out
                reason = stop.reason

    def _give_back(self, reason: StopReason) -> Outcome:
        """Paused or shutting down: keep the state and let the job be claimed again. Otherwise it is not ours."""
        if reason in (StopReason.CANCELLED, StopReason.LOST):
            return Outcome.CANCELLED if reason is StopReason.CANCELLED else Outcome.LOST
        try:
            if self._trainer is not None or self._probe is not None:
                self._save_if_possible()
                steps_done = self._trainer.steps_done if self._trainer else 0
                self._say(f"Fine-tuning job {reason.value} at step {steps_done}")
            self._services.queue.release(self._claim)
        except JobCancelledError:
            return Outcome.CANCELLED
        except FencedWriteError:
            return Outcome.LOST
        return Outcome(reason.value)

    def _vanish_with_job(self) -> None:
        """Where the job was deleted with its tenant, what this attempt wrote goes as well."""
        try:
            if self._services.queue.exists(self._job.id):
                return
            self._services.resume_points.discard(self._job.id)
            for digest in self._services.queue.without_version(self._published):
                self._services.store.delete(digest)
        except Exception:
            logger.exception("tuning.not_erased", extra=self._ids())

    def _fail(self, error: Exception) -> Outcome:
        """Write why. The tenant's own mistakes are told in full, ours only to the log."""
        if isinstance(error, AdapterError | ServiceError | EngineError):
            code, message = error.code or "training_failed", error.message
            param = error.param
        elif isinstance(error, torch.OutOfMemoryError):
            code, param = "out_of_memory", "hyperparameters"
            message = "The device has too little memory for this job: use a smaller lora_r or shorter examples."
        else:
            logger.exception("tuning.failed", extra=self._ids())
            code, message, param = "internal_error", "The job failed because of an internal error.", None
        try:
            self._services.queue.fail(self._claim, code=code, message=message, param=param)
        except JobCancelledError:
            return Outcome.CANCELLED
        except FencedWriteError:
            return Outcome.LOST
        return Outcome.FAILED

    def _parent_weights(self) -> LoraWeights | None:
        """The adapter that the job continues from, if any."""
        digest = self._job.spec.parent_digest
        if digest is None:
            return None
        if not self._services.queue.parent_is_of(self._claim, self._services.base.identity):
            raise StaleAdapterError(
                f"The job starts from '{self._job.spec.model}', which was trained on another base, or another "
                "quantization, than the one that is loaded now: start a job from the base",
                param="model",
            )
        files = self._services.store.read(digest)
        return read_adapter(files, self._services.base.signature, max_rank=self._services.max_lora_rank)

    def _ids(self) -> dict[str, Any]:
        return {"job_id": self._job.id, "tenant": self._job.tenant_id, "attempt": self._claim.attempt}


def _finish(run: EstimatedRun) -> float | None:
    """Unix seconds at which training will be over."""
    left = run.seconds_left()
    return None if left is None else time.time() + left
