"""Accuracy and ratings of versions, from feedback: on SQLite and Postgres."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from service.quality import Measure, Quality, VersionQuality
from service.tables import completions, feedback, quality_blocks, quality_streams
from tests.service.control_fixtures import control, database, database_url, postgres_server, postgres_url
from tests.service.retraining_fixtures import Practice, practice

__all__ = ["control", "database", "database_url", "postgres_server", "postgres_url", "practice"]


def versions(practice: Practice) -> dict[str, VersionQuality]:
    return {found.model: found for found in Quality(practice.control.database).versions(practice.tenant)}


def test_a_label_or_a_correction_that_equals_the_answer_is_right_and_any_other_is_wrong(practice: Practice) -> None:
    practice.consent()
    for opinion, correct in (
        ({"label": "a  medlar"}, 1.0),
        ({"label": "a quince"}, 0.0),
        ({"corrected": "a medlar\n"}, 1.0),
        ({"corrected": "a quince", "label": "a medlar"}, 0.0),
        ({"rating": -1.0}, None),
    ):
        assert practice.judge(practice.answer(), **opinion).correct == correct
    accuracy = versions(practice)["tiny"].measures[Measure.ACCURACY]
    assert (accuracy.judged, accuracy.rolling.total) == (4, 2.0)
    assert accuracy.interval is not None and 0.0 < accuracy.interval[0] < 0.5 < accuracy.interval[1] < 1.0


def test_it_is_known_without_the_answers_text(practice: Practice) -> None:
    completion = practice.answer("a secret medlar", captured=False)
    assert practice.judge(completion, label="a secret medlar").correct == 1.0
    with practice.control.database.read() as connection:
        assert "secret" not in str(connection.execute(sa.select(completions)).one())


def test_every_completion_counts_once_and_the_last_word_replaces(practice: Practice) -> None:
    completion = practice.answer()
    practice.judge(completion, user="ada", label="a quince", rating=-1.0)
    practice.judge(completion, user="bob", label="a medlar", rating=1.0)
    found = versions(practice)["tiny"].measures
    assert [(m.judged, m.rolling.mean) for m in found.values()] == [(1, 0.0), (1, 0.0)]
    practice.judge(completion, user="ada", label="a medlar", rating=0.5)
    found = versions(practice)["tiny"].measures
    assert [(m.judged, m.rolling.mean) for m in found.values()] == [(1, 1.0), (1, 0.75)]
    practice.judge(completion, user="ada", rating=0.5)
    assert [m.judged for m in versions(practice)["tiny"].measures.values()] == [0, 1]
    practice.judge(completion, user="ada", label="a medlar")
    assert [m.judged for m in versions(practice)["tiny"].measures.values()] == [1, 0]


def test_versions_and_tenants_are_kept_apart(practice: Practice) -> None:
    for model in ("tiny", "ft:one"):
        practice.judge(practice.answer(model=model), label="a medlar" if model == "tiny" else "a quince")
    assert {model: found.measures[Measure.ACCURACY].rolling.mean for model, found in versions(practice).items()} == {
        "tiny": 1.0,
        "ft:one": 0.0,
    }
    assert Quality(practice.control.database).versions(practice.control.zenith.id) == []


def test_a_tenants_accuracy_is_unknown_until_enough_is_judged(practice: Practice) -> None:
    quality = Quality(practice.control.database)
    for number in range(20):
        assert quality.accuracies() == {}
        practice.judge(practice.answer(model=f"ft:{number % 2}"), label="a medlar" if number % 4 else "a quince")
    assert quality.accuracies() == {practice.tenant: 0.75}
    with practice.control.database.begin() as connection:
        connection.execute(quality_blocks.update().values(updated_at=1.0))
    assert quality.accuracies() == {}, "nothing was judged in the last days"


@pytest.mark.slow
def test_a_fall_is_told_once_with_its_reason_and_outlives_the_feedback(practice: Practice) -> None:
    for _ in range(100):
        practice.judge(practice.answer(), label="a medlar")
    told = 0
    while versions(practice)["tiny"].fell_at is None:
        told += 1
        assert told < 40
        practice.retraining.due.clear()
        practice.judge(practice.answer(), label="a quince")
    assert practice.retraining.due.is_set()
    practice.retraining.due.clear()
    practice.judge(practice.answer(), label="a quince")
    assert not practice.retraining.due.is_set(), "it is told once"
    with practice.control.database.begin() as connection:
        connection.execute(feedback.delete())
    fallen = versions(practice)["tiny"]
    assert fallen.reason is not None and fallen.reason.startswith("Accuracy fell from 1.000 in the first 100")
    accuracy = fallen.measures[Measure.ACCURACY]
    assert accuracy.change is not None and accuracy.change[2] < 0.0 < accuracy.judged


def test_a_tenant_that_goes_takes_its_quality_along(practice: Practice) -> None:
    practice.judge(practice.answer(), label="a medlar")
    practice.control.tenants.delete(practice.tenant)
    with practice.control.database.read() as connection:
        for table in (quality_blocks, quality_streams):
            assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar() == 0
