"""/v1/quality: what users' judgements say of each version's answers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends

from service.api.auth import TenantDep
from service.api.json_body import JsonRoute
from service.api.pages import list_body, only_query
from service.api.services import ServicesDep
from service.quality import ROLLING_DAYS, Measure, Measured, VersionQuality
from service.sequential_test import Stream

router = APIRouter(route_class=JsonRoute, prefix="/v1/quality", tags=["quality"])


@router.get("", dependencies=[Depends(only_query())])
def list_quality(tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """Of every version that somebody judged."""
    return list_body([quality_body(found) for found in services.rollout.quality.versions(tenant.id)])


def quality_body(found: VersionQuality) -> dict[str, Any]:
    """Ratings here run from -1 to 1, as they are given."""
    return {
        "id": found.model,
        "object": "quality",
        "model": found.model,
        "digest": found.digest,
        "since": int(found.created_at),
        "rolling_days": ROLLING_DAYS,
        "accuracy": _accuracy(found.measures[Measure.ACCURACY]),
        "rating": _rating(found.measures[Measure.RATING]),
        "falling": found.fell_at is not None,
        "fell_at": None if found.fell_at is None else int(found.fell_at),
        "reason": found.reason,
    }


def _accuracy(found: Measured) -> dict[str, Any]:
    interval = found.interval
    return {
        "judged": found.judged,
        "rolling": None
        if interval is None
        else {"n": round(found.rolling.count), "value": found.rolling.mean, "interval": list(interval)},
        **_trend(found, lambda mean: mean, 1.0),
    }


def _rating(found: Measured) -> dict[str, Any]:
    rolling = found.rolling
    return {
        "judged": found.judged,
        "rolling": {"n": round(rolling.count), "value": _as_rating(rolling.mean)} if rolling.count else None,
        **_trend(found, _as_rating, 2.0),
    }


def _trend(found: Measured, shown: Any, scale: float) -> dict[str, Any]:
    """`change` and its interval hold at all times at once; null until there is something to compare."""
    change, fall = found.change, found.fall
    return {
        "baseline": None if found.baseline is None else _mean(found.baseline, shown),
        "since_baseline": None if found.since is None else _mean(found.since, shown),
        "change": None
        if change is None
        else {"value": scale * change[0], "interval": [scale * change[1], scale * change[2]]},
        "p_value": None if fall is None else fall.p_value,
    }


def _mean(stream: Stream, shown: Any) -> dict[str, Any]:
    return {"n": round(stream.count), "value": shown(stream.mean) if stream.count else None}


def _as_rating(mean: float) -> float:
    return 2.0 * mean - 1.0
