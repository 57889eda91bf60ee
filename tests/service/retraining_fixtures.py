"""Tenants whose users judge and correct answers, without an engine: rows as the service writes them."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from adapters.data_report import DataReport, Finding
from adapters.estimate import Estimate
from service.answer_digest import answer_digest
from service.captures import Exchange, user_digest
from service.data_reports import FileReport
from service.drift_events import DriftEvent
from service.drift_states import DriftState
from service.estimates import JobEstimate
from service.feedback import Feedback, FeedbackEntry, Opinion
from service.files import File, FilePurpose, Files
from service.job import JobSpec
from service.retraining import Retraining
from service.retraining_data import RetrainingFiles
from service.retraining_rows import Proposal
from service.retraining_worker import RetrainingWorker
from service.tenant_settings import TenantSettings
from service.traffic_log import CompletionRecord, Retention, TrafficLog, WholeAnswer
from tests.fakes import FakeBase
from tests.service.control_fixtures import Control

__all__ = ["practice"]


class FixedEstimates:
    """Estimates need the parent's weights; this one knows what it was asked."""

    def __init__(self) -> None:
        self.asked: list[JobSpec] = []

    def make(self, tenant_id: str, spec: JobSpec) -> JobEstimate:
        self.asked.append(spec)
        return JobEstimate(Estimate(1, 2, 3, 0, 5, 4.0), {"lora_r": 8}, 6, 7)


class QuickReports:
    """Real ones load a model of languages; this one counts lines."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self.findings: tuple[Finding, ...] = ()

    def submit(self, tenant_id: str, training: File, validation: File | None = None) -> Future[FileReport]:
        with self._files.open(tenant_id, training.id) as stream:
            report = DataReport(self.findings, {"training": {"examples": len(stream.readlines())}})
        done: Future[FileReport] = Future()
        done.set_result(FileReport("filereport-1", 0.0, report))
        return done


def drifted(tenant_id: str, model: str) -> DriftEvent:
    """As the drift watch tells it."""
    return DriftEvent(
        tenant_id,
        model,
        digest="d" * 64,
        signal="prompt_embedding",
        state=DriftState.DRIFT,
        previous=DriftState.OK,
        statistic=0.4,
        threshold=0.2,
        samples=321,
        at=0.0,
    )


@dataclass
class Practice:
    """Everything between an answer and a job, over one database."""

    control: Control
    settings: TenantSettings
    traffic: TrafficLog
    retraining: Retraining
    worker: RetrainingWorker
    reports: QuickReports
    estimates: FixedEstimates
    moved: list[tuple[str, str]]
    num_answers: int = 0
    feedback: Feedback = field(init=False)

    def __post_init__(self) -> None:
        self.feedback = Feedback(self.control.database, self.traffic, lambda tenant, rating: None, self.retraining)

    @property
    def tenant(self) -> str:
        return self.control.acme.id

    def consent(self, **choices: object) -> None:
        self.settings.change(self.tenant, capture=True, **choices)  # type: ignore[arg-type]

    def answer(
        self,
        text: str = "a medlar",
        *,
        model: str = "tiny",
        alias: str | None = None,
        prompt: str | None = None,
        user: str | None = None,
        days_ago: float = 0.0,
        captured: bool = True,
    ) -> str:
        """An answer as the API reports it; its id."""
        self.num_answers += 1
        completion, at = f"chatcmpl-{self.num_answers}", time.time() - days_ago * 86400
        asked = {"messages": [{"role": "user", "content": prompt or f"word {self.num_answers}?"}]}
        exchange = Exchange(completion, self.tenant, user_digest(self.tenant, user), model, asked, text, at)
        self.traffic.completed(CompletionRecord(completion, self.tenant, model, None, alias, None, at))
        digest = answer_digest(completion, text)
        self.traffic.answered(WholeAnswer(completion, self.tenant, digest, exchange if captured else None))
        self.traffic.flush()
        return completion

    def judge(self, completion: str, **opinion: object) -> FeedbackEntry:
        return self.feedback.give(self.tenant, Opinion(completion, **opinion))  # type: ignore[arg-type]

    def correct(self, count: int, **answer: object) -> None:
        """So many different answers, all of them corrected."""
        for _ in range(count):
            self.judge(self.answer(**answer), corrected="a quince")  # type: ignore[arg-type]

    def upload(self, count: int) -> str:
        rows = [
            {"messages": [{"role": "user", "content": f"old {i}?"}, {"role": "assistant", "content": "a medlar"}]}
            for i in range(count)
        ]
        lines = [json.dumps(row).encode() + b"\n" for row in rows]
        return self.control.files.create(self.tenant, "train.jsonl", FilePurpose.FINE_TUNE, lines).id

    def publish(self, *, alias: str | None = "best", original: int = 40, digest: str = "d" * 64) -> str:
        return self.control.publish(alias=alias, training_file=self.upload(original), digest=digest, suffix="fruit")

    def drift(self, model: str, **changes: Any) -> None:
        self.retraining.drift_changed(replace(drifted(self.tenant, model), **changes))

    def proposals(self) -> list[Proposal]:
        """Oldest first."""
        return list(reversed(self.retraining.list(self.tenant, after=None, limit=100).items))

    @property
    def proposal(self) -> Proposal:
        return self.proposals()[-1]

    def messages(self, proposal: Proposal) -> list[str]:
        return [event.message for event in reversed(self.retraining.events(proposal))]

    def rows(self, file_id: str | None) -> list[dict[str, object]]:
        assert file_id is not None
        with self.control.files.open(self.tenant, file_id) as stream:
            return [json.loads(line) for line in stream]


@pytest.fixture
def practice(control: Control) -> Practice:
    """Retrainings that start by themselves are an hour apart."""
    traffic = TrafficLog(control.database, Retention(), judge=pytest.fail, on_dropped=pytest.fail)
    moved: list[tuple[str, str]] = []
    observer = _Observer(moved)
    retraining = Retraining(control.database, control.registry, control.jobs, observer, cooldown_seconds=3600.0)
    estimates, reports = FixedEstimates(), QuickReports(control.files)
    builder = RetrainingFiles(control.files, FakeBase(), 256)
    worker = RetrainingWorker(retraining, control.files, builder, reports, estimates)
    return Practice(control, TenantSettings(control.database), traffic, retraining, worker, reports, estimates, moved)


@dataclass(frozen=True)
class _Observer:
    moved: list[tuple[str, str]]

    def retraining_moved(self, trigger: str, outcome: str) -> None:
        self.moved.append((str(trigger), str(outcome)))
