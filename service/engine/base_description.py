"""What there is to know of the loaded base without its weights: names, tokenizer, chat format, bounds.

Can be sent to another process: the one that talks to clients needs no more than this. Knows no layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapters.lora_weights import BaseSignature
from service.engine.chat_format import render_chat, special_texts
from service.engine.errors import ChatTemplateError
from service.engine.quantization import Quantization


@dataclass(frozen=True)
class BaseDescription:
    """`fingerprint` names the weights, however they are quantized; `max_model_len` is prompt + answer, in tokens;
    `activation_bytes` those of one number that a layer hands on."""

    name: str
    tokenizer: Tokenizer
    quantization: Quantization
    fingerprint: str
    max_model_len: int
    eos_token_ids: frozenset[int]
    pad_token_id: int
    vocab_size: int
    signature: BaseSignature
    activation_bytes: int

    @property
    def identity(self) -> str:
        """What an adapter is published for: these weights, held like this. Another rounding of them is another base."""
        return f"{self.fingerprint}+{self.quantization}"

    @property
    def chat_template(self) -> str:
        """The template's text; the one for tools where there are several."""
        return str(self.tokenizer.get_chat_template(tools=[{}]))

    @property
    def added_tokens(self) -> frozenset[str]:
        """Texts that are one token each, whatever stands around them."""
        return frozenset(self.tokenizer.get_added_vocab())

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The prompt's tokens in the base's own chat format; what the messages say stays text.

        Raises:
            ChatTemplateError: the template refuses the messages.
        """
        try:
            return render_chat(self.tokenizer, self._special_texts, messages, tools, add_generation_prompt)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise ChatTemplateError(f"the chat template of {self.name}: {error}", param="messages") from error

    @cached_property
    def _special_texts(self) -> re.Pattern[str] | None:
        return special_texts(self.tokenizer)

    def description(self) -> BaseDescription:
        """This, without whatever else a subclass holds."""
        return BaseDescription(**{field.name: getattr(self, field.name) for field in fields(BaseDescription)})
