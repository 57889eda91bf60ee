"""A base's tokenizer and chat template without its weights, for what only counts tokens. Cannot compute anything."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from service.engine.base_model import DEFAULT_CHAT_TEMPLATE
from service.engine.chat_format import render_chat, special_texts
from service.engine.checkpoint import read_tokenizer
from service.engine.errors import BaseModelError, ChatTemplateError


@dataclass(frozen=True)
class TextBase:
    """Renders as `BaseModel` does."""

    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    max_model_len: int

    @property
    def added_tokens(self) -> frozenset[str]:
        return frozenset(self.tokenizer.get_added_vocab())

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, add_generation_prompt: bool = True
    ) -> list[int]:
        try:
            return render_chat(self.tokenizer, self._special_texts, messages, tools, add_generation_prompt)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise ChatTemplateError(f"the chat template: {error}", param="messages") from error

    @cached_property
    def _special_texts(self) -> re.Pattern[str] | None:
        return special_texts(self.tokenizer)


def load_text_base(path_or_hub_id: str) -> TextBase:
    """Raises BaseModelError with the way out."""
    tokenizer, config, max_model_len = read_tokenizer(path_or_hub_id)
    tokenizer.model_max_length = sys.maxsize  # no warnings about what is only counted
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    ends = {tokenizer.eos_token_id, *_as_list(config.get_text_config().eos_token_id)} - {None}
    if not ends:
        raise BaseModelError(f"base {path_or_hub_id!r} names no token that ends an answer")
    return TextBase(tokenizer, frozenset(map(int, ends)), max_model_len)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
