"""GET /v1/usage, for a tenant about itself, and GET /v1/admin/usage, about everybody and as CSV. Knows the wire."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse, Response, StreamingResponse

from service.api.auth import AdminDep, TenantDep
from service.api.description import answers
from service.api.json_body import JsonRoute
from service.api.pages import only_query
from service.api.services import ServicesDep
from service.errors import InvalidRequestError
from service.usage_report import DAY, UsageBucket, UsageDimension, UsageQuery, UsageReport, UsageResult
from service.usage_rows import COUNTS, HOUR

router = APIRouter(route_class=JsonRoute, tags=["usage"])

WIDTHS = {"1h": HOUR, "1d": DAY}
DEFAULT_LIMITS = {"1h": 24, "1d": 7}
MAX_LIMITS = {"1h": 168, "1d": 31}
_PARAMETERS = ("start_time", "end_time", "bucket_width", "group_by", "limit", "page")

Time = Annotated[int, Query(ge=0, lt=2**35)]
MaybeTime = Annotated[int | None, Query(ge=0, lt=2**35)]
Width = Literal["1h", "1d"]
GroupBy = Annotated[str | None, Query(max_length=64)]
BucketLimit = Annotated[int | None, Query(ge=1)]


@router.get("/v1/usage", dependencies=[Depends(only_query(*_PARAMETERS))])
def get_usage(
    tenant: TenantDep,
    services: ServicesDep,
    start_time: Time,
    end_time: MaybeTime = None,
    bucket_width: Width = "1d",
    group_by: GroupBy = None,
    limit: BucketLimit = None,
    page: MaybeTime = None,
) -> dict[str, Any]:
    groups = _groups(group_by, (UsageDimension.MODEL, UsageDimension.API_KEY))
    query = _query(start_time, end_time, bucket_width, groups, tenant.id)
    return _page(services.usage_report, query, bucket_width, limit, page)


@router.get(
    "/v1/admin/usage",
    dependencies=[Depends(only_query(*_PARAMETERS, "tenant_id", "format"))],
    responses=answers("application/json", "text/csv"),
)
def get_everybodys_usage(
    _: AdminDep,
    services: ServicesDep,
    start_time: Time,
    end_time: MaybeTime = None,
    bucket_width: Width = "1d",
    group_by: GroupBy = None,
    limit: BucketLimit = None,
    page: MaybeTime = None,
    tenant_id: Annotated[str | None, Query(max_length=64)] = None,
    format: Literal["json", "csv"] = "json",
) -> Response:
    """With `format=csv` one row for each group in each bucket, and all of them: there are no pages."""
    groups = _groups(group_by, tuple(UsageDimension))
    if format == "json":
        query = _query(start_time, end_time, bucket_width, groups, tenant_id)
        return JSONResponse(_page(services.usage_report, query, bucket_width, limit, page))
    for name, value in (("limit", limit), ("page", page)):
        if value is not None:
            raise InvalidRequestError(f"A CSV is written whole: leave out '{name}'.", param=name)
    query = _query(start_time, end_time, bucket_width, groups or tuple(UsageDimension), tenant_id)
    headers = {"content-disposition": 'attachment; filename="usage.csv"'}
    lines = _csv(services.usage_report.all_buckets(query))
    return StreamingResponse(lines, headers=headers, media_type="text/csv; charset=utf-8")


def _query(
    start: int, end: int | None, width: Width, groups: tuple[UsageDimension, ...], tenant_id: str | None
) -> UsageQuery:
    end = int(time.time()) + 1 if end is None else end
    if end <= start:
        raise InvalidRequestError("'end_time' must be later than 'start_time'.", param="end_time")
    return UsageQuery.covering(start, end, WIDTHS[width], groups, tenant_id)


def _groups(asked: str | None, known: Sequence[UsageDimension]) -> tuple[UsageDimension, ...]:
    names = [] if not asked else asked.split(",")
    for name in names:
        if name not in known or names.count(name) > 1:
            choices = ", ".join(f"'{one}'" for one in known)
            raise InvalidRequestError(
                f"'group_by' takes {choices}, each once, with commas between them.", param="group_by"
            )
    return tuple(UsageDimension(name) for name in names)


def _page(report: UsageReport, query: UsageQuery, width: Width, limit: int | None, page: int | None) -> dict[str, Any]:
    limit = DEFAULT_LIMITS[width] if limit is None else limit
    if limit > MAX_LIMITS[width]:
        raise InvalidRequestError(f"'limit' may be {MAX_LIMITS[width]} at most with buckets of {width}.", param="limit")
    if page is not None and (page % query.width or not query.start <= page < query.end):
        raise InvalidRequestError("'page' must be the 'next_page' of this very request.", param="page")
    start = query.start if page is None else page
    shown = UsageQuery(start, query.end, query.width, query.group_by, query.tenant_id)
    buckets = report.buckets(shown, limit)
    has_more = buckets[-1].end < query.end
    return {
        "object": "page",
        "data": [_bucket_body(bucket) for bucket in buckets],
        "has_more": has_more,
        "next_page": str(buckets[-1].end) if has_more else None,
    }


def _bucket_body(bucket: UsageBucket) -> dict[str, Any]:
    return {
        "object": "bucket",
        "start_time": bucket.start,
        "end_time": bucket.end,
        "results": [_result_body(result) for result in bucket.results],
    }


def _result_body(result: UsageResult) -> dict[str, Any]:
    """OpenAI's names, and `training_tokens`."""
    used = result.tokens
    return {
        "object": "usage.result",
        "input_tokens": used.prompt_tokens,
        "output_tokens": used.completion_tokens,
        "input_cached_tokens": used.cached_tokens,
        "training_tokens": used.training_tokens,
        "num_model_requests": used.requests,
        "tenant_id": result.tenant_id,
        "api_key_id": result.key_id,
        "model": result.model,
    }


def _csv(buckets: Iterator[UsageBucket]) -> Iterator[str]:
    yield _line(["start_time", "end_time", "tenant_id", "tenant", "api_key_id", "model", *COUNTS])
    for bucket in buckets:
        times = [_shown(bucket.start), _shown(bucket.end)]
        lines = []
        for result in bucket.results:
            who = (result.tenant_id, result.tenant_name, result.key_id, result.model)
            lines.append(_line([*times, *(one or "" for one in who), *_counts(result)]))
        yield "".join(lines)


def _counts(result: UsageResult) -> list[int]:
    return [getattr(result.tokens, name) for name in COUNTS]


def _line(fields: Sequence[object]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(fields)
    return out.getvalue()


def _shown(unix_seconds: int) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
