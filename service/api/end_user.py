"""Whose request this is: for a canary's split, somebody who should always land on the same side. Knows no split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from service.api.schemas import ChatRequest, CompletionRequest, Message
from service.api.sse import to_json
from service.errors import InvalidRequestError

SESSION_HEADER = "x-rootstock-session"
MAX_SESSION_LENGTH = 256


@dataclass(frozen=True)
class EndUser:
    """Called, it tells who asks; `name` is None for somebody who was not named."""

    name: str | None
    body: ChatRequest | CompletionRequest

    def __call__(self) -> str:
        return self.name or f"first_turn:{_digest(_first_turn(self.body))}"


def end_user(request: Request, body: ChatRequest | CompletionRequest) -> EndUser:
    """In this order: `user`, `safety_identifier`, the session header, the first turn of the conversation.

    The last is the same in every later turn, so a conversation stays on its side. Raises InvalidRequestError.
    """
    session = request.headers.get(SESSION_HEADER)
    if session is not None and not 0 < len(session) <= MAX_SESSION_LENGTH:
        raise InvalidRequestError(
            f"The header '{SESSION_HEADER}' must have 1 to {MAX_SESSION_LENGTH} characters.", param=SESSION_HEADER
        )
    identifier = body.safety_identifier if isinstance(body, ChatRequest) else None
    for kind, name in (("user", body.user), ("safety_identifier", identifier), ("session", session)):
        if name:
            return EndUser(f"{kind}:{name}", body)
    return EndUser(None, body)


def _first_turn(body: ChatRequest | CompletionRequest) -> object:
    if isinstance(body, CompletionRequest):
        return body.prompt[0]
    return [[message.template_role, message.text] for message in _before_answers(body.messages)]


def _before_answers(messages: Sequence[Message]) -> Sequence[Message]:
    roles = [message.role for message in messages]
    return messages[: roles.index("assistant")] if "assistant" in roles else messages


def _digest(value: object) -> str:
    return hashlib.sha256(to_json(value).encode()).hexdigest()
