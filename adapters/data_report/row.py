"""One example as the checks look at it: texts, keys to compare by, no tokens. Knows no check."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

from adapters.example import ChatExample, CompletionExample, Example

_END_MARKS = re.compile(r"[\s.!?…。！？]+\Z")  # noqa: RUF001


@dataclass(frozen=True)
class Row:
    """`texts` are (role, text) in order; a completion's prompt reads as the user's."""

    line: int
    example: Example
    texts: tuple[tuple[str, str], ...]
    question: str
    """Everything before the last learned answer but the system messages, which many examples share."""
    answer: str

    @classmethod
    def of(cls, example: Example) -> Row:
        if isinstance(example, CompletionExample):
            texts = (("user", example.prompt), ("assistant", example.completion))
            return cls(example.line, example, texts, example.prompt, example.completion)
        said = tuple((message.role, message.content) for message in example.messages)
        asked = "\n".join(message.content for message in example.prompt if message.role != "system")
        return cls(example.line, example, said, asked, example.answer)

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """Everything that is learned."""
        if isinstance(self.example, ChatExample):
            return tuple(message.content for message in self.example.messages if message.trained)
        return (self.answer,)

    @cached_property
    def exact_key(self) -> int:
        """Equal for examples of the same texts, byte for byte."""
        return text_key("\x1e".join(f"{role}\x1f{text}" for role, text in self.texts))

    @cached_property
    def input_key(self) -> int:
        """Equal for prompts that differ in case, white space or the last marks at most; system messages count."""
        if isinstance(self.example, ChatExample):
            parts = [f"{message.role}\x1f{plain(message.content)}" for message in self.example.prompt]
            return text_key("\x1e".join(parts))
        return text_key(plain(self.question))

    @cached_property
    def answer_key(self) -> int:
        return text_key(plain(self.answer))


def plain(text: str) -> str:
    """Text with the differences removed that nobody means: case, white space, Unicode forms, the last marks."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return _END_MARKS.sub("", text) or text


def text_key(text: str) -> int:
    """64 bits, the same on every run."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
