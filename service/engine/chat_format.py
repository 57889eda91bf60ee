"""A conversation as tokens, in the base's own chat format. What a client wrote stays text. Knows no request.

A tokenizer takes `<|im_start|>` for the token wherever it stands, so a client could begin a turn of the system's in the
middle of its own words (prompt injection through the template). Such texts are broken in two before they are encoded.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer


def special_texts(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Whatever becomes a special token wherever it stands; None for a tokenizer without any."""
    texts = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def render_chat(
    tokenizer: Tokenizer,
    special: re.Pattern[str] | None,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
) -> list[int]:
    """The prompt's tokens. `special` is the tokenizer's. Raises whatever the template raises.

    Where a text is broken, it decodes to what it was; a tokenizer that begins every text with a space puts one there.
    """
    seam = f"seam{secrets.token_hex(16)}"
    given = [dict(message) for message in messages], [dict(tool) for tool in tools] if tools else None
    broken = given if special is None else tuple(_broken(part, special, seam) for part in given)
    text = str(
        tokenizer.apply_chat_template(
            broken[0], tools=broken[1], add_generation_prompt=add_generation_prompt, tokenize=False
        )
    )
    return [
        token
        for piece in text.split(seam)
        for token in tokenizer(piece, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    ]


def _broken(value: Any, special: re.Pattern[str], seam: str) -> Any:
    """The same value with a seam in every special text."""
    if isinstance(value, str):
        return seam.join(_pieces(value, special))
    if isinstance(value, Mapping):
        return {_broken(key, special, seam): _broken(item, special, seam) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_broken(item, special, seam) for item in value]
    return value


def _pieces(text: str, special: re.Pattern[str]) -> list[str]:
    """`text` cut behind the first character of every special text, so that no piece holds one."""
    cuts, start = [0], 0
    while found := special.search(text, start):
        start = found.start() + 1
        cuts.append(start)
    return [text[a:b] for a, b in pairwise([*cuts, len(text)])]
