"""Whether a request can ever run on this base, and how long its answer may become. Knows no queue and no load."""

from __future__ import annotations

from service.engine.base_description import BaseDescription
from service.engine.errors import RequestRejectedError
from service.engine.sequence import GenerationRequest


def checked_max_tokens(request: GenerationRequest, base: BaseDescription, *, can_embed: bool) -> int:
    """How many tokens the answer may have; 0 for an embedding. Raises RequestRejectedError."""
    if request.pooling and not can_embed:
        raise RequestRejectedError(
            "this base does not show its hidden states", param="model", code="embeddings_unsupported"
        )
    if request.pooling and request.measure and request.adapter is not None:
        raise RequestRejectedError("a prompt is measured by the base alone", param="model")
    _check_prompt(request, base)
    if request.pooling:
        return 0
    _check_logit_bias(request, base)
    room, wanted = base.max_model_len - len(request.prompt_token_ids), request.sampling.max_tokens
    return room if wanted is None else min(wanted, room)


def _check_prompt(request: GenerationRequest, base: BaseDescription) -> None:
    length, limit = len(request.prompt_token_ids), base.max_model_len
    if length == 0:
        raise RequestRejectedError("the prompt is empty", param="prompt", code="invalid_prompt")
    if length > (limit if request.pooling else limit - 1):  # an answer needs room for a token
        raise RequestRejectedError(
            f"the prompt has {length} tokens; this model takes at most {limit} with the answer",
            param="messages",
            code="context_length_exceeded",
        )
    if not all(0 <= token < base.vocab_size for token in request.prompt_token_ids):
        raise RequestRejectedError(
            f"token ids must lie in 0..{base.vocab_size - 1}", param="prompt", code="invalid_prompt"
        )


def _check_logit_bias(request: GenerationRequest, base: BaseDescription) -> None:
    for token, _ in request.sampling.logit_bias:
        if not 0 <= token < base.vocab_size:
            raise RequestRejectedError(
                f"'logit_bias' names token {token}; token ids lie in 0..{base.vocab_size - 1}",
                param="logit_bias",
                code="invalid_value",
            )
