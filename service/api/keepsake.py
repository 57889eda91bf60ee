"""What of a request may be kept for its tenant: nothing without consent, nothing that cannot be learned from.

An answer to a prompt of text, one choice of it. Tool calls are left out: training data has no form for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.api.schemas import ChatRequest, CompletionRequest
from service.captures import user_digest
from service.errors import InvalidRequestError
from service.rollout import Rollout


@dataclass(frozen=True)
class Keepsake:
    """The prompt, as `service.captures` keeps it, and whose it is."""

    prompt: Mapping[str, Any]
    user_digest: str


def keepsake(rollout: Rollout, tenant_id: str, body: ChatRequest | CompletionRequest) -> Keepsake | None:
    """None: nothing is kept. Raises InvalidRequestError for `store: true` where nothing can be. Reads the database."""
    if body.store is False:
        return None
    consents = rollout.traffic.records_completions and rollout.settings.captures(tenant_id)
    prompt = _prompt(body) if consents and body.num_choices == 1 else None
    if prompt is None:
        if body.store:
            raise _cannot_store(consents)
        return None
    named = body.user or (body.safety_identifier if isinstance(body, ChatRequest) else None)
    return Keepsake(prompt, user_digest(tenant_id, named or None))


def _prompt(body: ChatRequest | CompletionRequest) -> dict[str, Any] | None:
    if isinstance(body, CompletionRequest):
        whole = len(body.prompt) == 1 and isinstance(body.prompt[0], str)
        return {"prompt": body.prompt[0]} if whole else None
    if body.may_call or any(message.tool_calls or message.tool_call_id for message in body.messages):
        return None
    return {"messages": [{"role": message.template_role, "content": message.text} for message in body.messages]}


def _cannot_store(consents: bool) -> InvalidRequestError:
    if not consents:
        return InvalidRequestError(
            "'store' asks to keep text, and you have not turned that on: PUT /v1/settings with {\"capture\": true}.",
            param="store",
            code="capture_off",
        )
    return InvalidRequestError(
        "'store' keeps one answer to a prompt of text: no tools, no prompts of tokens, and 'n' must be 1.",
        param="store",
        code="cannot_store",
    )
