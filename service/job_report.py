"""The data report of a job's files: made before training, told in events, obeyed by strict jobs. Knows no queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from adapters.data_report import DataReport, Severity, make_report
from adapters.errors import DatasetError
from service.data_reports import ReportedBase, base_of_reports
from service.files import Files
from service.job import EventLevel, Job
from service.tuning_data import BREATH_SECONDS

MAX_EVENT_LINES = 10
MAX_TOLD = 5


class ReportEvent(NamedTuple):
    message: str
    level: EventLevel
    data: dict[str, Any] | None


def report_on(files: Files, job: Job, base: ReportedBase, check: Callable[[], None]) -> DataReport:
    """`check` is called for each line; whatever it raises ends the report."""

    def breathe() -> None:
        check()
        time.sleep(BREATH_SECONDS)

    validation = job.spec.validation_file
    return make_report(
        partial(files.open, job.tenant_id, job.spec.training_file),
        None if validation is None else partial(files.open, job.tenant_id, validation),
        base=base_of_reports(base),
        breathe=breathe,
    )


def report_events(report: DataReport) -> Iterator[ReportEvent]:
    """One with all findings as data, then a warning for each kind that is more than a note."""
    findings = [{**finding.as_dict(), "lines": list(finding.lines[:MAX_EVENT_LINES])} for finding in report.findings]
    yield ReportEvent(report.summary(), EventLevel.INFO, {"findings": findings})
    for finding in report.findings:
        if finding.severity is not Severity.INFO:
            yield ReportEvent(finding.describe(), EventLevel.WARN, None)


def strict_error(report: DataReport) -> DatasetError | None:
    """Why a strict job stops; None when it may go on."""
    errors = report.of(Severity.ERROR)
    if not errors:
        return None
    told = " ".join(finding.describe() for finding in errors[:MAX_TOLD])
    more = f" And {len(errors) - MAX_TOLD} more kinds." if len(errors) > MAX_TOLD else ""
    return DatasetError(
        f"The data report has errors, and the job is strict. {told}{more}",
        code="data_report_errors",
        param=errors[0].file,
    )
