"""The corpus against a running service: right status, right shape, an unharmed service, nothing left behind."""

from __future__ import annotations

import json

import pytest

from tests.hostile import archives, bodies, grammars, headers, names, numbers, text
from tests.hostile.cases import Case, Request, upload
from tests.hostile.harness import Target
from tests.hostile.training_files import FILES

CORPUS = [
    pytest.param(case, id=f"{noun.__name__.rsplit('.', 1)[-1]}: {case.name}")
    for noun in (headers, bodies, numbers, text, grammars, names)
    for case in noun.CASES
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CORPUS)
def test_a_hostile_request_is_refused_and_leaves_nothing(
    case: Case, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    target.attack(case, caplog)


@pytest.mark.slow  # each report takes a second
@pytest.mark.parametrize("name", FILES)
def test_a_hostile_training_file_gets_a_report_that_names_the_line(
    name: str, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    content, says = FILES[name]
    before = target.remains()
    file_id = json.loads(target.send(upload(content)).body)["id"]
    report = Request("POST", f"/v1/files/{file_id}/report")
    target.attack(Case(name, report, 200, says=says), caplog)
    assert target.send(Request("DELETE", f"/v1/files/{file_id}")).status == 200
    after = target.remains()
    assert (after.rows["files"], after.files) == (before.rows["files"], before.files)


@pytest.mark.parametrize("name", archives.ARCHIVES)
def test_a_hostile_archive_is_refused_and_leaves_nothing(
    name: str, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    archive = archives.ARCHIVES[name]
    request = archives.import_of(archive.make(archives.honest(target.service.base.signature)))
    target.attack(Case(name, request, archive.status, says=archive.says), caplog)


def test_the_corpus_is_as_large_as_it_says() -> None:
    assert len(CORPUS) + len(FILES) + len(archives.ARCHIVES) >= 250
