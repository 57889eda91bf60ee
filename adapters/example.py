"""One training example, as a value and as a line of JSONL. Knows no file and no tokens.

Chat: `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…", "weight": 1}]}`.
Completion: `{"prompt": "…", "completion": "…"}`. Preference, for the method `dpo`: `{"input": {"messages": […]},
"preferred_output": [{"role": "assistant", "content": "…"}], "non_preferred_output": […]}`. Chats and completions may
carry `"metadata": {"field": "value"}` and `"assertions": […]` (`adapters.assertions`): nobody learns from these,
evaluations slice and check by them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from adapters.assertions import Assertion, parse_assertions

MAX_LINE_BYTES = 8 * 1024 * 1024
MAX_METADATA_FIELDS = 16
MAX_METADATA_CHARACTERS = 256
ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {"role", "content", "weight"}
_PREFERENCE_KEYS = {"input", "preferred_output", "non_preferred_output"}
_SUSPICIOUS = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
"""Escapes of NUL or of a surrogate; nothing else can bring one into a parsed string."""
_SIDE_KEYS = {"metadata", "assertions"}


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    trained: bool = False
    """True for the assistant's messages, unless their `weight` is 0."""

    def as_dict(self) -> dict[str, str]:
        """As a chat template takes it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class ChatExample:
    line: int
    messages: tuple[Message, ...]
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    assertions: tuple[Assertion, ...] = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last learned answer."""
        return self.messages[: self._last_learned]

    @property
    def answer(self) -> str:
        """The last learned answer."""
        return self.messages[self._last_learned].content

    @property
    def _last_learned(self) -> int:
        return max(index for index, message in enumerate(self.messages) if message.trained)


@dataclass(frozen=True)
class CompletionExample:
    line: int
    prompt: str
    completion: str
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    assertions: tuple[Assertion, ...] = ()

    @property
    def answer(self) -> str:
        return self.completion


@dataclass(frozen=True)
class PreferenceExample:
    """Two answers to one prompt, of which the first is the better one."""

    line: int
    prompt: tuple[Message, ...]
    preferred_answer: str
    non_preferred_answer: str

    @property
    def preferred(self) -> ChatExample:
        """The prompt with the better answer."""
        return self._answered(self.preferred_answer)

    @property
    def non_preferred(self) -> ChatExample:
        return self._answered(self.non_preferred_answer)

    def _answered(self, answer: str) -> ChatExample:
        context = (replace(message, trained=False) for message in self.prompt)
        return ChatExample(self.line, (*context, Message("assistant", answer, trained=True)))


Example = ChatExample | CompletionExample


def opening_of(example: Example) -> tuple[Message, ...] | str:
    """What comes before the first answer: how the conversation, or the completion, begins."""
    if isinstance(example, CompletionExample):
        return example.prompt
    return tuple(takewhile(lambda message: message.role != "assistant", example.messages))


def parse_example(line: int, raw: bytes) -> Example:
    """One line as an example. Raises ValueError saying what is wrong with it."""
    value = _json_object(raw, "with 'messages', or with 'prompt' and 'completion'")
    if _PREFERENCE_KEYS & value.keys():
        raise ValueError("a pair of answers, which the method 'dpo' learns from; 'supervised' takes 'messages'")
    if "messages" in value:
        _refuse_unknown(value, {"messages"} | _SIDE_KEYS, "")
        return ChatExample(line, _messages(value["messages"]), _metadata(value), _assertions(value))
    if "prompt" in value or "completion" in value:
        _refuse_unknown(value, {"prompt", "completion"} | _SIDE_KEYS, "")
        texts = _text(value, "prompt", ""), _text(value, "completion", "")
        return CompletionExample(line, *texts, _metadata(value), _assertions(value))
    raise ValueError("must have 'messages', or 'prompt' and 'completion'")


def parse_learned(line: int, raw: bytes) -> Example:
    """A line of either method as what is learned from it: of a pair, the better answer. Raises ValueError."""
    if b'"preferred_output"' in raw:
        return parse_preference(line, raw).preferred
    return parse_example(line, raw)


def parse_preference(line: int, raw: bytes) -> PreferenceExample:
    """One line as a pair of answers. Raises ValueError saying what is wrong with it."""
    value = _json_object(raw, "with 'input', 'preferred_output' and 'non_preferred_output'")
    if not _PREFERENCE_KEYS & value.keys() and ({"messages", "prompt", "completion"} & value.keys()):
        raise ValueError(
            "an example for the method 'supervised'; 'dpo' takes 'input', 'preferred_output' and 'non_preferred_output'"
        )
    _refuse_unknown(value, _PREFERENCE_KEYS, "")
    given = value.get("input")
    if not isinstance(given, dict):
        raise ValueError("'input' must be an object with 'messages'")
    _refuse_unknown(given, {"messages"}, "input: ")
    prompt = _message_list(given.get("messages"), "input.messages")
    if prompt[0].role == "assistant":
        raise ValueError("input.messages: first message must not be from 'assistant'")
    if prompt[-1].role == "assistant":
        raise ValueError("input.messages: last message must not be from 'assistant': that is what the outputs are")
    preferred, other = (_output(value, key) for key in ("preferred_output", "non_preferred_output"))
    if preferred == other:
        raise ValueError("'preferred_output' and 'non_preferred_output' are the same: there is nothing to prefer")
    return PreferenceExample(line, prompt, preferred, other)


def _output(value: dict[str, Any], key: str) -> str:
    """The one assistant message that an output holds."""
    messages = _message_list(value.get(key), key)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise ValueError(f"{key!r} must be a list of one message from 'assistant'")
    return messages[0].content


def _json_object(raw: bytes, needed: str) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES // (1024 * 1024)} MiB")
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_no_key_twice)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object {needed}")
    if _SUSPICIOUS.search(raw):
        _check_texts(value)
    return value


def _check_texts(root: Any) -> None:
    """Every string and every key of a line: neither NUL nor half of a surrogate pair can be kept or sent."""
    todo = [root]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            todo += value
        elif isinstance(value, str) and "\0" in value:
            raise ValueError(f"{value[:40]!r} holds a NUL character, which is no text")
        elif isinstance(value, str) and not _is_text(value):
            raise ValueError(f"{value[:40]!r} holds half of a surrogate pair, which is no text")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One of the two values would be dropped in silence."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in value if names.count(name) > 1)[:40]!r} is there twice")
    return value


def _metadata(value: dict[str, Any]) -> dict[str, str]:
    pairs = value.get("metadata", {})
    if not isinstance(pairs, dict) or not all(isinstance(text, str) for text in pairs.values()):
        raise ValueError("'metadata' must be an object whose values are strings")
    if len(pairs) > MAX_METADATA_FIELDS:
        raise ValueError(f"'metadata' has {len(pairs)} fields, at most {MAX_METADATA_FIELDS} are allowed")
    for name, text in pairs.items():
        if not name or max(len(name), len(text)) > MAX_METADATA_CHARACTERS:
            raise ValueError(
                f"'metadata': {name[:40]!r} is too long: names have 1 to {MAX_METADATA_CHARACTERS} characters,"
                " values at most as many"
            )
    return pairs


def _assertions(value: dict[str, Any]) -> tuple[Assertion, ...]:
    return parse_assertions(value["assertions"], "assertions") if "assertions" in value else ()


def _messages(value: Any) -> tuple[Message, ...]:
    messages = _message_list(value, "messages")
    if messages[-1].role != "assistant":
        raise ValueError("last message must be from 'assistant'")
    if messages[0].role == "assistant":
        raise ValueError("first message must not be from 'assistant': there is nothing to answer")
    if not any(message.trained for message in messages):
        raise ValueError("every assistant message has weight 0: there is nothing to learn")
    return messages


def _message_list(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name!r} must be a list of messages")
    return tuple(_message(item, f"{name}[{index}]: ") for index, item in enumerate(value))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"{where}must be an object with 'role' and 'content'")
    _refuse_unknown(value, _MESSAGE_KEYS, where)
    role = value.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}'role' must be one of {', '.join(map(repr, ROLES))}")
    weight = value.get("weight", 1)
    if "weight" in value and role != "assistant":
        raise ValueError(f"{where}'weight' belongs to messages from 'assistant' only")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"{where}'weight' must be 0 or 1")
    return Message(role, _text(value, "content", where), trained=role == "assistant" and weight == 1)


def _text(value: dict[str, Any], key: str, where: str) -> str:
    if key not in value:
        raise ValueError(f"{where}{key!r} is missing")
    text = value[key]
    if not isinstance(text, str):
        raise ValueError(f"{where}{key!r} must be a string")
    if not text.strip():
        raise ValueError(f"{where}{key!r} is empty")
    return text


def _refuse_unknown(value: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(map(str, value.keys() - known))
    if unknown:
        raise ValueError(f"{where}unknown key {unknown[0]!r} (known: {', '.join(sorted(known))})")
