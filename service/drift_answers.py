"""An answer as the numbers that its monitor takes. Knows no monitor; keeps no text."""

from __future__ import annotations

import json

from adapters.refusals import find_refusal
from service.drift_intake import Answered
from service.engine.sequence import FinishReason


def answer_values(answered: Answered, *, expects_json: bool) -> dict[str, float | None]:
    """By signal; None where nothing can be said. `expects_json`: the adapter was made to answer in JSON."""
    is_cut = answered.finish_reason is FinishReason.LENGTH
    wants_json = expects_json or answered.turn.expects_json
    return {
        "answer_nll": answered.nll,
        "answer_entropy": answered.entropy,
        "answer_length": float(answered.length),
        "finish_length": float(is_cut),
        "valid_json": float(_is_json(answered.text)) if wants_json and answered.is_whole else None,
        "refusal": float(find_refusal(answered.text) is not None),
    }


def _is_json(text: str) -> bool:
    """Strictly: no NaN, and nothing around it."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
