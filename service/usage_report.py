"""Reads the books: sums by time and by whatever is asked for. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

import sqlalchemy as sa

from service.database import Database
from service.tables import tenants, usage_hours
from service.usage_rows import COUNTS, HOUR, Tokens

DAY = 24 * HOUR
BUCKETS_AT_ONCE = 24
"""Of a report that is written whole, how many are read in one query."""


class UsageDimension(StrEnum):
    TENANT = "tenant"
    API_KEY = "api_key"
    MODEL = "model"


_COLUMNS = {
    UsageDimension.TENANT: usage_hours.c.tenant_id,
    UsageDimension.API_KEY: usage_hours.c.key_id,
    UsageDimension.MODEL: usage_hours.c.model,
}


@dataclass(frozen=True)
class UsageQuery:
    """Buckets of `width` seconds (an hour or a day, UTC) from `start` up to `end`; `tenant_id` None: everybody's."""

    start: int
    end: int
    width: int
    group_by: tuple[UsageDimension, ...] = ()
    tenant_id: str | None = None

    @classmethod
    def covering(
        cls, start: int, end: int, width: int, group_by: tuple[UsageDimension, ...], tenant_id: str | None
    ) -> UsageQuery:
        """Whole buckets only: the first holds `start`, the last ends at `end` or later."""
        return cls(start // width * width, -(-end // width) * width, width, group_by, tenant_id)


@dataclass(frozen=True)
class UsageResult:
    """Of one group in one bucket; None: not grouped by that. `tenant_name` None: that tenant is gone."""

    tokens: Tokens
    tenant_id: str | None = None
    tenant_name: str | None = None
    key_id: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class UsageBucket:
    start: int
    end: int
    results: tuple[UsageResult, ...]


class UsageReport:
    def __init__(self, database: Database) -> None:
        self._database = database

    def buckets(self, query: UsageQuery, limit: int) -> list[UsageBucket]:
        """The first `limit` of them, empty ones among them."""
        end = min(query.end, query.start + limit * query.width)
        found: dict[int, list[UsageResult]] = {start: [] for start in range(query.start, end, query.width)}
        if found:
            for start, result in self._results(replace(query, end=end)):
                found[start].append(result)
        return [UsageBucket(start, start + query.width, tuple(results)) for start, results in found.items()]

    def all_buckets(self, query: UsageQuery) -> Iterator[UsageBucket]:
        """Those that are not empty, a few read at a time: a year of everybody's is never in memory."""
        first, last = self._extent()
        start = max(query.start, first // query.width * query.width)
        end = min(query.end, last + query.width)
        while start < end:
            for bucket in self.buckets(replace(query, start=start, end=end), BUCKETS_AT_ONCE):
                if bucket.results:
                    yield bucket
            start += BUCKETS_AT_ONCE * query.width

    def _extent(self) -> tuple[int, int]:
        query = sa.select(sa.func.min(usage_hours.c.hour), sa.func.max(usage_hours.c.hour))
        with self._database.read() as connection:
            first, last = connection.execute(query).one()
        return (0, -DAY) if first is None else (first, last + HOUR)

    def _results(self, query: UsageQuery) -> list[tuple[int, UsageResult]]:
        bucket = usage_hours.c.hour - usage_hours.c.hour % query.width
        keys = [bucket.label("bucket"), *(_COLUMNS[dimension] for dimension in query.group_by)]
        sums = [sa.func.sum(usage_hours.c[name]).label(name) for name in COUNTS]
        statement = sa.select(*keys, *sums).where(usage_hours.c.hour >= query.start, usage_hours.c.hour < query.end)
        if query.tenant_id is not None:
            statement = statement.where(usage_hours.c.tenant_id == query.tenant_id)
        places = [
            sa.text(str(number + 1)) for number in range(len(keys))
        ]  # the same expression, and no parameter twice
        with self._database.read() as connection:
            rows = connection.execute(statement.group_by(*places).order_by(*places)).mappings().all()
            names: dict[str, str] = {}
            if UsageDimension.TENANT in query.group_by:
                names = {row.id: row.name for row in connection.execute(sa.select(tenants.c.id, tenants.c.name))}
        return [(int(row["bucket"]), _result(row, names)) for row in rows]


def _result(row: sa.RowMapping, names: dict[str, str]) -> UsageResult:
    tenant_id = row.get("tenant_id")
    return UsageResult(
        Tokens(**{name: int(row[name]) for name in COUNTS}),
        tenant_id=tenant_id,
        tenant_name=None if tenant_id is None else names.get(tenant_id),
        key_id=row.get("key_id"),
        model=row.get("model"),
    )
