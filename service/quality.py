"""How good a tenant's users find the answers of each version: accuracy and ratings, from feedback. Never called drift.

An answer is right when it equals what somebody says it should have been (`corrected`, or else `label`). Every
completion counts once in each measure, by its first judgement; the last word of whoever gave that replaces it. Sums
are kept in blocks (`service.quality_fall`), so they outlive feedback itself and hold no text. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.database import Database
from service.intervals import Interval, Moments, wilson
from service.quality_fall import BASELINE_BLOCKS, BLOCK_SIZE, Fall, baseline_of, difference, find_fall, summed
from service.sequential_test import Stream
from service.tables import epoch_now, feedback, quality_blocks, quality_streams

ROLLING_DAYS = 30
MIN_JUDGED = 20
"""Below that a tenant's accuracy is unknown to its gauge."""

DAY = 86400.0


class Measure(StrEnum):
    """Both from 0 (bad) to 1: a rating r counts as (1 + r) / 2."""

    ACCURACY = "accuracy"
    RATING = "rating"


@dataclass(frozen=True)
class Measured:
    """One measure of one version. `rolling` is of the blocks of the last days, `change` of all since the baseline."""

    judged: int
    rolling: Stream
    baseline: Stream | None
    since: Stream | None
    fall: Fall | None

    @property
    def interval(self) -> Interval | None:
        """Wilson's, for one look at a rate; not for ratings, which are no 0s and 1s."""
        return wilson(Moments(round(self.rolling.count), self.rolling.total, self.rolling.total))

    @property
    def change(self) -> tuple[float, float, float] | None:
        """Mean since the baseline minus the baseline's, with an always-valid 95 % interval."""
        if self.baseline is None or self.since is None or not self.since.count:
            return None
        return (self.since.mean - self.baseline.mean, *difference(self.baseline, self.since))


@dataclass(frozen=True)
class VersionQuality:
    model: str
    digest: str | None
    created_at: float
    fell_at: float | None
    reason: str | None
    measures: Mapping[Measure, Measured]


class Quality:
    def __init__(self, database: Database) -> None:
        self._database = database

    def versions(self, tenant_id: str) -> list[VersionQuality]:
        """Of every version that somebody judged, by its name."""
        mine = sa.select(quality_streams).where(quality_streams.c.tenant_id == tenant_id)
        with self._database.read() as connection:
            streams = connection.execute(mine.order_by(quality_streams.c.model)).all()
            return [
                VersionQuality(
                    row.model, row.digest, row.created_at, row.fell_at, row.reason, _measured(connection, row)
                )
                for row in streams
            ]

    def accuracies(self) -> dict[str, float]:
        """Of every tenant with enough judged answers in the last days, over all its versions."""
        count, total = sa.func.sum(quality_blocks.c.count), sa.func.sum(quality_blocks.c.total)
        query = (
            sa.select(quality_blocks.c.tenant_id, total / count)
            .where(quality_blocks.c.measure == Measure.ACCURACY, quality_blocks.c.count > 0, _recent())
            .group_by(quality_blocks.c.tenant_id)
            .having(count >= MIN_JUDGED)
        )
        with self._database.read() as connection:
            return {tenant_id: min(1.0, max(0.0, float(mean))) for tenant_id, mean in connection.execute(query)}


def judge(connection: Connection, entry: sa.Row[Any], correct: float | None, rating: float | None) -> bool:
    """Count an entry of feedback with its new values instead of its old ones; whether quality is now known to have
    fallen, which is told once for a version. The caller holds `lock_tenant` and writes the values themselves."""
    values = {Measure.ACCURACY: (entry.correct, correct), Measure.RATING: (_share(entry.rating), _share(rating))}
    changed = [_count(connection, entry, measure, *pair) for measure, pair in values.items()]
    return any(changed) and _has_fallen(connection, entry.tenant_id, entry.model)


def _count(connection: Connection, entry: sa.Row[Any], measure: Measure, old: float | None, new: float | None) -> bool:
    column = feedback.c[f"{measure}_block"]
    block: int | None = getattr(entry, column.name)
    if block is None:
        if new is None or _counts_already(connection, entry, column):
            return False
        block, old = _open_block(connection, entry, measure), None
    count, total = (new is not None) - (old is not None), (new or 0.0) - (old or 0.0)
    of_block = sa.and_(_blocks_of(entry.tenant_id, entry.model, measure), quality_blocks.c.number == block)
    connection.execute(
        quality_blocks.update()
        .where(of_block)
        .values(count=quality_blocks.c.count + count, total=quality_blocks.c.total + total, updated_at=epoch_now())
    )
    mine = feedback.update().where(feedback.c.seq == entry.seq)
    connection.execute(mine.values({column: None if new is None else block}))
    return True


def _counts_already(connection: Connection, entry: sa.Row[Any], column: sa.Column[Any]) -> bool:
    """By somebody else's judgement of the same answer."""
    same = sa.and_(feedback.c.tenant_id == entry.tenant_id, feedback.c.completion_id == entry.completion_id)
    query = sa.select(feedback.c.seq).where(same, column.is_not(None)).limit(1)
    return connection.execute(query).first() is not None


def _open_block(connection: Connection, entry: sa.Row[Any], measure: Measure) -> int:
    """The number of the block that takes the next judgement."""
    of_stream = sa.select(quality_blocks.c.number, quality_blocks.c.count)
    of_stream = of_stream.where(_blocks_of(entry.tenant_id, entry.model, measure))
    last = connection.execute(of_stream.order_by(quality_blocks.c.number.desc()).limit(1)).one_or_none()
    if last is not None and last._mapping["count"] < BLOCK_SIZE:
        return int(last.number)
    number = 0 if last is None else last.number + 1
    key = {"tenant_id": entry.tenant_id, "model": entry.model}
    connection.execute(
        quality_blocks.insert().values(
            **key, measure=measure, number=number, count=0, total=0.0, updated_at=epoch_now()
        )
    )
    if last is None and connection.execute(sa.select(quality_streams.c.model).where(_stream(**key))).first() is None:
        connection.execute(quality_streams.insert().values(**key, digest=entry.digest, created_at=epoch_now()))
    return number


def _has_fallen(connection: Connection, tenant_id: str, model: str) -> bool:
    mine = _stream(tenant_id, model)
    if connection.execute(sa.select(quality_streams.c.fell_at).where(mine)).scalar() is not None:
        return False
    for measure in Measure:
        fall = find_fall(_streams_of(_blocks(connection, tenant_id, model, measure)))
        if fall is not None and fall.is_certain:
            told = {"fell_at": epoch_now(), "reason": _why(measure, fall)}
            connection.execute(quality_streams.update().where(mine).values(told))
            return True
    return False


def _why(measure: Measure, fall: Fall) -> str:
    name = {Measure.ACCURACY: "Accuracy", Measure.RATING: "The mean rating (0 to 1)"}[measure]
    return (
        f"{name} fell from {fall.baseline.mean:.3f} in the first {fall.baseline.count:.0f} judged answers to"
        f" {fall.since.mean:.3f} in the last {fall.since.count:.0f} (always-valid p = {fall.p_value:.2g})."
    )


def _measured(connection: Connection, stream: sa.Row[Any]) -> dict[Measure, Measured]:
    found = {}
    for measure in Measure:
        rows = _blocks(connection, stream.tenant_id, stream.model, measure)
        blocks, later = _streams_of(rows), _streams_of(rows[BASELINE_BLOCKS:])
        found[measure] = Measured(
            judged=round(sum(block.count for block in blocks)),
            rolling=summed(_streams_of([row for row in rows if row.recent])),
            baseline=baseline_of(blocks),
            since=summed(later) if later else None,
            fall=find_fall(blocks),
        )
    return found


def _blocks(connection: Connection, tenant_id: str, model: str, measure: Measure) -> Sequence[sa.Row[Any]]:
    query = sa.select(quality_blocks, _recent().label("recent")).where(_blocks_of(tenant_id, model, measure))
    return connection.execute(query.order_by(quality_blocks.c.number)).all()


def _streams_of(rows: Sequence[sa.Row[Any]]) -> list[Stream]:
    """Sums and differences of floats may end a hair outside."""
    return [Stream(row._mapping["count"], min(max(row.total, 0.0), row._mapping["count"])) for row in rows]


def _recent() -> sa.ColumnElement[bool]:
    return quality_blocks.c.updated_at > epoch_now() - ROLLING_DAYS * DAY


def _blocks_of(tenant_id: str, model: str, measure: Measure) -> sa.ColumnElement[bool]:
    c = quality_blocks.c
    return sa.and_(c.tenant_id == tenant_id, c.model == model, c.measure == measure)


def _stream(tenant_id: str, model: str) -> sa.ColumnElement[bool]:
    return sa.and_(quality_streams.c.tenant_id == tenant_id, quality_streams.c.model == model)


def _share(rating: float | None) -> float | None:
    return None if rating is None else (1.0 + rating) / 2.0
