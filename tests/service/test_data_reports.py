"""Data reports through HTTP and through the command line."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from adapters.data_report import DataReport
from service import data_reports
from service.cli import app
from service.data_reports import DataReports
from service.errors import DeadlineExceededError, RateLimitError
from service.files import File, FilePurpose
from tests.fakes import FakeBase
from tests.service.control_fixtures import Control
from tests.service.http_fixtures import Served

KEY = "ghp_" + "a1B2" * 9


def _lines(count: int, *more: str) -> bytes:
    rows = [f"what is word number {number} of the list?" for number in range(count)]
    examples = [
        {"messages": [{"role": "user", "content": row}, {"role": "assistant", "content": "a medlar"}]}
        for row in (*rows, *more)
    ]
    return b"".join(json.dumps(example).encode() + b"\n" for example in examples)


def _upload(served: Served, content: bytes, key: str | None = None) -> str:
    return served.client(key).files.create(file=("train.jsonl", content), purpose="fine-tune").id


def _report(served: Served, file_id: str, body: object = None, key: str | None = None) -> httpx.Response:
    return served.http(key).post(f"/v1/files/{file_id}/report", json=body)


@pytest.mark.slow
def test_a_file_is_reported_on_alone_and_with_a_validation_file(served: Served) -> None:
    train, valid = _upload(served, _lines(30, f"my key is {KEY}")), _upload(served, _lines(25))
    alone = _report(served, train)
    assert alone.status_code == 200, alone.text
    body = alone.json()
    assert (body["object"], body["file_id"], body["validation_file"], body["model"]) == (
        "file.report",
        train,
        None,
        "tiny",
    )
    (secret,) = (finding for finding in body["findings"] if finding["code"] == "secret")
    assert (secret["severity"], secret["count"], secret["lines"]) == ("error", 1, [31])
    assert "gh•••" in secret["excerpts"][0] and KEY not in alone.text
    assert body["statistics"]["training"]["tokens"]["example"]["max"] > 40
    both = _report(served, train, {"validation_file": valid}).json()
    assert "validation_overlap" in {finding["code"] for finding in both["findings"]}
    assert both["id"] != body["id"]


@pytest.mark.slow
def test_the_same_content_is_answered_from_memory_but_not_to_another_tenant(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _report(served, _upload(served, _lines(30))).json()
    monkeypatch.setattr(data_reports, "make_report", lambda *sources, **options: DataReport(()))
    again = _report(served, _upload(served, _lines(30))).json()
    assert (again["id"], again["statistics"]) == (first["id"], first["statistics"])
    zenith = served.control.zenith_key
    assert _report(served, _upload(served, _lines(30), zenith), key=zenith).json()["statistics"] == {}


def test_a_wrong_request_for_a_report_says_what_is_wrong(served: Served) -> None:
    mine, theirs = _upload(served, _lines(12)), _upload(served, _lines(12), served.control.zenith_key)
    assert _report(served, theirs).status_code == 404
    for body, param in (({"colour": "red"}, "colour"), ({"validation_file": theirs}, "validation_file")):
        refused = _report(served, mine, body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_a_jobs_report_is_fetched_by_the_jobs_id(served: Served) -> None:
    job = served.control.create_job()
    path = f"/v1/fine_tuning/jobs/{job.id}/report"
    early = served.http().get(path)
    assert (early.status_code, early.json()["error"]["code"]) == (404, "report_not_ready")
    served.control.queue.save_data_report(served.control.claim(), DataReport(()).as_dict())
    body = served.http().get(path).json()
    assert (body["object"], body["job_id"], body["findings"]) == ("fine_tuning.job.report", job.id, [])
    assert served.http(served.control.zenith_key).get(path).status_code == 404


def test_strict_is_kept_with_the_job_and_shown(served: Served) -> None:
    created = served.client().fine_tuning.jobs.create(
        model="tiny", training_file=_upload(served, _lines(12)), extra_body={"strict": True}
    )
    assert created.model_extra is not None and created.model_extra["strict"] is True


@pytest.mark.slow
def test_a_report_that_takes_too_long_ends_and_says_so(control: Control) -> None:
    reports = DataReports(control.files, FakeBase(), limit_seconds=0.0)
    with pytest.raises(DeadlineExceededError, match="report on a part"):
        reports.submit(control.acme.id, _stored(control, 50)).result(30)
    reports.close()


def test_a_tenant_waits_for_two_reports_at_most(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def slow(*sources: object, **options: object) -> DataReport:
        go_on.wait(30)
        return DataReport(())

    monkeypatch.setattr(data_reports, "make_report", slow)
    reports = DataReports(control.files, FakeBase())
    running = [reports.submit(control.acme.id, _stored(control, count)) for count in (12, 13)]
    with pytest.raises(RateLimitError):
        reports.submit(control.acme.id, _stored(control, 14))
    go_on.set()
    assert all(future.result(30).report == DataReport(()) for future in running)
    reports.submit(control.acme.id, _stored(control, 14)).result(30)
    reports.close()


def _stored(control: Control, count: int) -> File:
    return control.files.create(control.acme.id, "train.jsonl", FilePurpose.FINE_TUNE, [_lines(count)])


@pytest.mark.slow
def test_the_command_shows_a_table_and_fails_on_errors(tmp_path: Path) -> None:
    dirty, clean = tmp_path / "dirty.jsonl", tmp_path / "clean.jsonl"
    dirty.write_bytes(_lines(30, f"my key is {KEY}"))
    clean.write_bytes(_lines(30))
    failed = CliRunner().invoke(app, ["data", "report", str(dirty)])
    assert failed.exit_code == 1 and "secret" in failed.stdout and KEY not in failed.stdout
    done = CliRunner().invoke(app, ["data", "report", str(clean), "--json", "--validation", str(clean)])
    assert done.exit_code == 1  # the validation file is the training file
    assert "validation_overlap" in {finding["code"] for finding in json.loads(done.stdout)["findings"]}
    assert CliRunner().invoke(app, ["data", "report", str(clean)]).exit_code == 0
    assert CliRunner().invoke(app, ["data", "report", str(clean), "--base", "no such base"]).exit_code == 2
