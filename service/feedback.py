"""What people thought of an answer: a rating, a label, a corrected text. Knows no HTTP.

One row for each completion and end user, the last word wins. Rows keep what the completion's record said (model,
digest, alias, arm), so they outlive it. A user's name is kept as a hash; corrected text only if the tenant turned
capture on.
Whether the answer was right is settled when the entry is written (`service.quality`).
In a canary's comparison every end user counts once, with the first answer that they rated: people who rate much,
or always the same way, weigh no more than others, and the numbers stay independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.answer_digest import answer_digest
from service.captures import user_digest
from service.database import Database, Page, lock_tenant, new_id, page_of
from service.errors import ConflictError, InvalidRequestError, NotFoundError
from service.experiment import Arm, Measure
from service.experiment_rows import add_measures
from service.intervals import Moments
from service.quality import judge
from service.tables import completions, epoch_now, feedback
from service.tenant_settings import choices_of
from service.traffic_log import TrafficLog

MAX_USERS = 100
"""Of one completion: more ratings of a single answer would be a flood."""


@dataclass(frozen=True)
class Opinion:
    """What somebody says of an answer; `rating` from -1 (bad) to 1 (good). `label` or, in full, `corrected` is what it
    should have been."""

    completion_id: str
    user: str | None = None
    rating: float | None = None
    label: str | None = None
    corrected: str | None = None


@dataclass(frozen=True)
class FeedbackEntry:
    id: str
    completion_id: str
    model: str
    digest: str | None
    alias: str | None
    arm: str | None
    rating: float | None
    label: str | None
    corrected: str | None
    correct: float | None
    created_at: float
    updated_at: float


class Listener(Protocol):
    """Hears of what may lead to retraining."""

    def wake(self) -> None: ...


class Feedback:
    def __init__(
        self,
        database: Database,
        traffic: TrafficLog,
        on_feedback: Callable[[str, float | None], None],
        listener: Listener | None = None,
    ) -> None:
        """`on_feedback` counts, with the tenant's id and the rating; `listener` hears of corrections and of quality
        that fell."""
        self._database = database
        self._traffic = traffic
        self._on_feedback = on_feedback
        self._listener = listener

    def give(self, tenant_id: str, opinion: Opinion) -> FeedbackEntry:
        """Raises NotFoundError for a completion that is not on record, InvalidRequestError for text nobody may keep."""
        self._await_record(tenant_id, opinion.completion_id)
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            if opinion.corrected is not None:
                _check_capture(connection, tenant_id)
            before = connection.execute(_mine(tenant_id, opinion)).one_or_none()
            if before is None:
                before = _insert(connection, tenant_id, opinion)
            fell = _replace(connection, before, opinion)
            after = connection.execute(_mine(tenant_id, opinion)).one()
        if after.experiment_id is not None:
            self._traffic.judge_soon(tenant_id, after.experiment_id)
        self._on_feedback(tenant_id, opinion.rating)
        if self._listener is not None and (fell or opinion.corrected is not None):
            self._listener.wake()
        return _entry(after)

    def list(self, tenant_id: str, *, after: str | None, limit: int) -> Page[FeedbackEntry]:
        """Newest first."""
        query = sa.select(feedback).where(feedback.c.tenant_id == tenant_id)
        with self._database.read() as connection:
            rows, has_more = page_of(connection, query, feedback, after=after, limit=limit, descending=True)
        return Page(tuple(_entry(row) for row in rows), has_more)

    def _await_record(self, tenant_id: str, completion_id: str) -> None:
        """The answer may be so fresh that its record, or the answer's digest, is still on its way."""
        if not self._is_known(tenant_id, completion_id):
            self._traffic.flush()

    def _is_known(self, tenant_id: str, completion_id: str) -> bool:
        with self._database.read() as connection:
            record = connection.execute(_record(tenant_id, completion_id)).one_or_none()
        return record is not None and record.answer_digest is not None


def _insert(connection: Connection, tenant_id: str, opinion: Opinion) -> sa.Row[Any]:
    """An entry that says nothing yet."""
    record = connection.execute(_record(tenant_id, opinion.completion_id)).one_or_none()
    if record is None:
        raise NotFoundError(
            f"There is no completion '{opinion.completion_id}' of yours on record: give the 'id' of an answer, within"
            " the time for which the service keeps them.",
            param="completion_id",
            code="completion_not_found",
        )
    of_completion = sa.and_(feedback.c.tenant_id == tenant_id, feedback.c.completion_id == opinion.completion_id)
    if connection.execute(sa.select(sa.func.count()).where(of_completion)).scalar_one() >= MAX_USERS:
        raise ConflictError(
            f"Completion '{opinion.completion_id}' has feedback of {MAX_USERS} users already.",
            param="completion_id",
            code="too_much_feedback",
        )
    values = {name: getattr(record, name) for name in ("model", "digest", "alias", "experiment_id", "arm", "unit")}
    connection.execute(
        feedback.insert().values(
            id=new_id("fb"),
            tenant_id=tenant_id,
            completion_id=opinion.completion_id,
            user_digest=user_digest(tenant_id, opinion.user),
            represents_unit=False,
            created_at=epoch_now(),
            updated_at=epoch_now(),
            **values,
        )
    )
    return connection.execute(_mine(tenant_id, opinion)).one()


def _replace(connection: Connection, before: sa.Row[Any], opinion: Opinion) -> bool:
    """The new word for the old one, in the entry, in the sums of its experiment and in its version's quality; whether
    that is now known to have fallen."""
    correct = _correct(connection, before, opinion)
    fell = judge(connection, before, correct, opinion.rating)
    represents = before.represents_unit or (opinion.rating is not None and _is_first_of_unit(connection, before))
    connection.execute(
        feedback.update()
        .where(feedback.c.seq == before.seq)
        .values(
            rating=opinion.rating,
            label=opinion.label,
            corrected=opinion.corrected,
            correct=correct,
            represents_unit=represents,
            updated_at=epoch_now(),
        )
    )
    if before.experiment_id is None:
        return fell
    arm = Arm(before.arm)
    added = {(before.experiment_id, arm, Measure.RATING): _change(before.rating, opinion.rating)}
    if represents:
        was = before.rating if before.represents_unit else None
        added[before.experiment_id, arm, Measure.DOWN] = _change(_down(was), _down(opinion.rating))
    add_measures(connection, added)
    return fell


def _correct(connection: Connection, entry: sa.Row[Any], opinion: Opinion) -> float | None:
    """1 when the answer is what it should have been; None when nobody says, or when there was not one whole answer."""
    expected = opinion.label if opinion.corrected is None else opinion.corrected
    if expected is None:
        return None
    query = _record(entry.tenant_id, entry.completion_id).with_only_columns(completions.c.answer_digest)
    digest = connection.execute(query).scalar()
    return None if digest is None else float(digest == answer_digest(entry.completion_id, expected))


def _is_first_of_unit(connection: Connection, entry: sa.Row[Any]) -> bool:
    if entry.experiment_id is None:
        return False
    of_unit = sa.and_(feedback.c.experiment_id == entry.experiment_id, feedback.c.unit == entry.unit)
    rated = sa.select(feedback.c.seq).where(of_unit, feedback.c.represents_unit)
    return connection.execute(rated.limit(1)).first() is None


def _down(rating: float | None) -> float | None:
    """The share of a thumb down: 0 to 1."""
    return None if rating is None else (1.0 - rating) / 2.0


def _change(before: float | None, after: float | None) -> Moments:
    """What to add to a sum that holds `before`, so that it holds `after`."""
    old, new = (Moments.of(() if value is None else (value,)) for value in (before, after))
    return Moments(new.count - old.count, new.total - old.total, new.squares - old.squares)


def _check_capture(connection: Connection, tenant_id: str) -> None:
    if not choices_of(connection, tenant_id).capture:
        raise InvalidRequestError(
            "'corrected' is text to be stored, and you have not turned that on: PUT /v1/settings with"
            " {\"capture\": true} first, or send 'rating' or 'label' alone.",
            param="corrected",
            code="capture_off",
        )


def _record(tenant_id: str, completion_id: str) -> sa.Select[Any]:
    return sa.select(completions).where(completions.c.tenant_id == tenant_id, completions.c.id == completion_id)


def _mine(tenant_id: str, opinion: Opinion) -> sa.Select[Any]:
    return sa.select(feedback).where(
        feedback.c.tenant_id == tenant_id,
        feedback.c.completion_id == opinion.completion_id,
        feedback.c.user_digest == user_digest(tenant_id, opinion.user),
    )


def _entry(row: sa.Row[Any]) -> FeedbackEntry:
    return FeedbackEntry(**{name: getattr(row, name) for name in FeedbackEntry.__dataclass_fields__})
