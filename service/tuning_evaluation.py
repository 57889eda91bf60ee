"""A job's last phase before publication: the comparison, the forgetting probe, the verdicts. Knows no training step.

The job does not fail when only this cannot be done; then nothing passes the gate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from adapters.errors import AdapterError
from adapters.evaluation import Entrant, Evaluation, EvaluationOptions
from adapters.evaluation_report import EvaluationReport
from adapters.forgetting import general_texts, measure_forgetting
from adapters.gate import judge
from adapters.peft_format import read_adapter
from adapters.store import AdapterStore
from adapters.trainable import TrainableLora, TrainRouting
from adapters.trainer import Trainer
from adapters.verdicts import TrainingVerdict, judge_training
from service.background_generation import BackgroundGeneration, Submitting
from service.engine.base_model import BaseModel
from service.engine.errors import EngineError
from service.job import Claim, EventLevel, GateDecision
from service.job_queue import JobQueue
from service.tuning_data import BREATH_SECONDS, JobFiles, TuningData
from service.tuning_report import evaluation_message, forgetting_message
from service.versions import AdapterVersion

MAX_TRAINING_SAMPLE = 2000
"""Training examples that tell the kind of task and lend the shots."""
MAX_PROBE_LENGTH = 512


class Say(Protocol):
    """Writes one of the job's events."""

    def __call__(
        self, message: str, level: EventLevel = EventLevel.INFO, *, data: Mapping[str, Any] | None = None
    ) -> None: ...


class TuningWorkplace(Protocol):
    """The part of `TuningServices` that is needed here."""

    @property
    def queue(self) -> JobQueue: ...
    @property
    def store(self) -> AdapterStore: ...
    @property
    def base(self) -> BaseModel: ...
    @property
    def engine(self) -> Submitting: ...
    @property
    def max_lora_rank(self) -> int: ...


@dataclass(frozen=True)
class Evaluated:
    """What is known of the candidate. `decision` is what the gate says, for the transaction that publishes it."""

    report: EvaluationReport | None
    training: TrainingVerdict
    decision: GateDecision

    def as_dict(self) -> dict[str, Any]:
        """As the version keeps it."""
        report = {} if self.report is None else self.report.as_dict()
        return {**report, "training": asdict(self.training)}


class TuningEvaluation:
    """The evaluation of one claimed job's candidate."""

    def __init__(self, services: TuningWorkplace, claim: Claim, check: Callable[[], None], say: Say) -> None:
        self._services = services
        self._claim = claim
        self._spec = claim.job.spec
        self._check = check
        self._say = say

    def run(self, trainer: Trainer, files: JobFiles, data: TuningData, digest: str) -> Evaluated:
        """`digest` is the candidate's, in the store; the trainer's masters become those of its best weights."""
        trainer.adapter.load(trainer.best_weights().modules)
        active = self._services.queue.active_version(self._claim)
        served = active if active is None or self._fits_base(active) else None
        report = self._compare(trainer, files, data, digest, served)
        training = self._judge_training(trainer)
        verdict = judge(report, self._spec.gate, first=served is None)
        return Evaluated(report, training, GateDecision(verdict, None if active is None else active.id))

    def _compare(
        self, trainer: Trainer, files: JobFiles, data: TuningData, digest: str, active: AdapterVersion | None
    ) -> EvaluationReport | None:
        base, spec = self._services.base, self._spec.evaluation
        route = TrainRouting(trainer.adapter, training=False)
        generate = BackgroundGeneration(self._services.engine, self._claim.job.tenant_id, self._check)
        options = EvaluationOptions(
            max_examples=spec.max_examples,
            max_seconds=spec.max_seconds,
            num_shots=spec.num_shots,
            task=spec.task,
            assertions=spec.assertions,
            seed=self._spec.seed,
        )
        try:
            report = Evaluation(base, trainer.loss, generate, base.max_model_len).compare(
                files.evaluated(data, spec.max_examples),
                files.trained(data, MAX_TRAINING_SAMPLE),
                candidate=Entrant(digest, route),
                active=None if active is None else self._entrant(active),
                options=options,
                between_packs=self._breathe,
            )
            if report is None:
                self._say("The model could not be evaluated: no example leaves room for an answer.", EventLevel.WARN)
                return None
            forgetting = measure_forgetting(
                general_texts(),
                base,
                trainer.loss,
                route,
                max_length=min(base.max_model_len, MAX_PROBE_LENGTH),
                seed=self._spec.seed,
                between_packs=self._breathe,
            )
        except (AdapterError, EngineError) as error:
            self._say(f"The model could not be evaluated: {error.message}", EventLevel.WARN)
            return None
        report = report.completed(forgetting, source=self._source(), active_model=None if active is None else active.id)
        self._say(evaluation_message(report), data=report.as_dict())
        self._say(forgetting_message(forgetting))
        return report

    def _judge_training(self, trainer: Trainer) -> TrainingVerdict:
        verdict = judge_training(
            [result.loss for result in trainer.history],
            {step: score.loss for step, score in trainer.scores.items()},
            num_skipped=sum(result.skipped for result in trainer.history),
        )
        advice = f" {verdict.advice}" if verdict.advice else ""
        self._say(f"Fit of the training: {verdict.fit}. {verdict.reason}{advice}", data=asdict(verdict))
        return verdict

    def _entrant(self, version: AdapterVersion) -> Entrant:
        """The adapter that answers under the alias, laid out so that the loss can reach it, too."""
        base = self._services.base
        weights = read_adapter(
            self._services.store.read(version.digest), base.signature, max_rank=self._services.max_lora_rank
        )
        adapter = TrainableLora(weights.spec, base.signature, seed=0, device=base.device)
        adapter.load(weights.modules)
        return Entrant(version.digest, TrainRouting(adapter, training=False))

    def _breathe(self) -> None:
        """Between two pieces of Python that take long, threads that wait for the interpreter get it."""
        self._check()
        time.sleep(BREATH_SECONDS)

    def _fits_base(self, version: AdapterVersion) -> bool:
        return version.base_fingerprint == self._services.base.identity

    def _source(self) -> str:
        """Where the examples are from. Those that the run was validated on have chosen its checkpoint, too."""
        if self._spec.evaluation.file is not None:
            return "evaluation_file"
        return "validation_file" if self._spec.validation_file is not None else "held_out_of_training_file"
