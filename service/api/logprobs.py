"""Token log-probabilities in OpenAI's two shapes: that of chat, and the legacy one of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.engine.sequence import TokenLogprob

MIN_LOGPROB = -9999.0
"""What OpenAI writes for an impossible token; JSON has no infinity."""


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""
    content = [{**_chat_token(token), "top_logprobs": [_chat_token(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": _finite(token.logprob), "bytes": list(token.bytes)}


def legacy_logprobs(tokens: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. `offset` is where the first token begins in the choice's text."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [_legacy_top(token) for token in tokens],
        "text_offset": offsets,
    }


def _legacy_top(token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens and always the chosen one, so there may be one more than asked for."""
    top = {other.token: _finite(other.logprob) for other in token.top}
    top.setdefault(token.token, _finite(token.logprob))
    return top


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
