"""/v1/feedback: what people thought of an answer, by the completion's id."""

from __future__ import annotations

from typing import Annotated, Any, Self

from fastapi import APIRouter, Depends
from pydantic import BeforeValidator, Field, model_validator

from service.api.auth import TenantDep
from service.api.json_body import JsonRoute
from service.api.pages import After, Limit, list_body, only_query
from service.api.services import ServicesDep
from service.api.wire import WireModel, field_error
from service.feedback import FeedbackEntry, Opinion

router = APIRouter(route_class=JsonRoute, prefix="/v1/feedback", tags=["feedback"])

MAX_CORRECTED_CHARACTERS = 64 * 1024


def _rating(value: object) -> object:
    """`"up"` is 1, `"down"` is -1."""
    if isinstance(value, str):
        if value not in ("up", "down"):
            raise ValueError('must be "up", "down" or a number from -1 to 1')
        return 1.0 if value == "up" else -1.0
    return value


class FeedbackRequest(WireModel):
    completion_id: str = Field(min_length=1, max_length=64)
    rating: Annotated[float | None, Field(ge=-1, le=1), BeforeValidator(_rating)] = None
    label: str | None = Field(None, min_length=1, max_length=128)
    corrected: str | None = Field(None, min_length=1, max_length=MAX_CORRECTED_CHARACTERS)
    user: str | None = Field(None, min_length=1, max_length=256)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.rating is None and self.label is None and self.corrected is None:
            raise field_error("rating", "give a 'rating', a 'label' or a 'corrected' text")
        return self


@router.post("")
def give_feedback(body: FeedbackRequest, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """Once for each completion and user: the last word replaces what was said before."""
    opinion = Opinion(body.completion_id, body.user, body.rating, body.label, body.corrected)
    return feedback_body(services.rollout.feedback.give(tenant.id, opinion))


@router.get("", dependencies=[Depends(only_query("after", "limit"))])
def list_feedback(tenant: TenantDep, services: ServicesDep, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Newest first."""
    page = services.rollout.feedback.list(tenant.id, after=after, limit=limit)
    return list_body([feedback_body(entry) for entry in page.items], has_more=page.has_more)


def feedback_body(entry: FeedbackEntry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "object": "feedback",
        "completion_id": entry.completion_id,
        "model": entry.model,
        "digest": entry.digest,
        "alias": entry.alias,
        "arm": entry.arm,
        "rating": entry.rating,
        "label": entry.label,
        "corrected": entry.corrected,
        "correct": None if entry.correct is None else entry.correct == 1.0,
        "created_at": int(entry.created_at),
        "updated_at": int(entry.updated_at),
    }
