"""Training examples as tenants write them: JSONL of chats or of completions. Knows no tokens and no model.

Chat: `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…", "weight": 1}]}`.
Completion: `{"prompt": "…", "completion": "…"}`. Preference, for the method `dpo`: `{"input": {"messages": […]},
"preferred_output": [{"role": "assistant", "content": "…"}], "non_preferred_output": […]}`. A file holds one kind. It is
read as a stream, line by line, and every complaint names its line. Chats and completions may carry
`"metadata": {"field": "value"}` and `"assertions": […]` (`adapters.assertions`): nobody learns from these, evaluations
slice and check by them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, TypeVar

from adapters.assertions import Assertion, parse_assertions
from adapters.errors import DatasetError

MIN_EXAMPLES = 10
MAX_LINE_BYTES = 8 * 1024 * 1024
MAX_COMPLAINTS = 20
MAX_METADATA_FIELDS = 16
MAX_METADATA_CHARACTERS = 256

ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {"role", "content", "weight"}
_PREFERENCE_KEYS = {"input", "preferred_output", "non_preferred_output"}
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
Parsed = TypeVar("Parsed", Example, PreferenceExample)


@dataclass(frozen=True)
class BadLine:
    """A line that is no example, and why."""

    line: int
    message: str


def read_examples(stream: BinaryIO, *, minimum: int = MIN_EXAMPLES, param: str = "training_file") -> Iterator[Example]:
    """Yield the examples of a JSONL stream, to be learned by imitation. Holds one line at a time.

    Raises:
        DatasetError: at the end, listing up to 20 bad lines; `invalid_n_examples` when there are too few.
            After the first bad line nothing more is yielded, the rest is only checked.
    """
    return _read(stream, parse_example, minimum, param)


def read_preferences(
    stream: BinaryIO, *, minimum: int = MIN_EXAMPLES, param: str = "training_file"
) -> Iterator[PreferenceExample]:
    """The same for pairs of answers."""
    return _read(stream, parse_preference, minimum, param)


def _read(stream: BinaryIO, parse: Callable[[int, bytes], Parsed], minimum: int, param: str) -> Iterator[Parsed]:
    complaints = Complaints(param)
    num_examples = 0
    for item in read_lines(stream, parse):
        if isinstance(item, BadLine):
            complaints.add(item.line, item.message)
            continue
        num_examples += 1
        if not complaints.lines:
            yield item
    complaints.raise_any()
    if num_examples < minimum:
        noun = "example" if num_examples == 1 else "examples"
        raise DatasetError(
            f"the file has {num_examples} {noun}, at least {minimum} are needed",
            code="invalid_n_examples",
            param=param,
        )


def read_lines(stream: BinaryIO, parse: Callable[[int, bytes], Parsed]) -> Iterator[Parsed | BadLine]:
    """Every line of a JSONL stream that is not blank, as an example or as what is wrong with it; never stops early.

    `parse` is `parse_example`, `parse_preference` or `parse_learned`.
    """
    kind: type[Parsed] | None = None
    for line, raw in _lines(stream):
        try:
            example = parse(line, raw)
            if kind is not None and not isinstance(example, kind):
                raise ValueError("chat examples and completion examples are mixed in one file")
        except (ValueError, RecursionError) as error:
            yield BadLine(line, str(error))
            continue
        kind = type(example)
        yield example


def examples_at(
    stream: BinaryIO, lines: Collection[int], parse: Callable[[int, bytes], Example] | None = None
) -> list[Example]:
    """The examples on these lines (1-based) of a stream that has been validated before."""
    wanted, parse = set(lines), parse or parse_example
    return [parse(line, raw) for line, raw in _lines(stream) if line in wanted]


def preferences_at(stream: BinaryIO, lines: Collection[int]) -> list[PreferenceExample]:
    """The same for pairs of answers."""
    wanted = set(lines)
    return [parse_preference(line, raw) for line, raw in _lines(stream) if line in wanted]


class Complaints:
    """What is wrong with a file, line by line; becomes one error."""

    def __init__(self, param: str) -> None:
        self.param = param
        self.lines: list[tuple[int, str]] = []
        self.num_more = 0

    def add(self, line: int, message: str) -> None:
        if len(self.lines) < MAX_COMPLAINTS:
            self.lines.append((line, message))
        else:
            self.num_more += 1

    def raise_any(self) -> None:
        """Raise a DatasetError about the first line that also lists the others; do nothing without complaints."""
        if not self.lines:
            return
        (line, message), *others = self.lines
        parts = [message, *(f"line {number}: {text}" for number, text in others)]
        if self.num_more:
            parts.append(f"and {self.num_more} more lines")
        raise DatasetError("; ".join(parts), line=line, param=self.param)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank. A line over MAX_LINE_BYTES comes shortened to one byte more than that."""
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if len(raw) > MAX_LINE_BYTES:
            rest = raw
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(MAX_LINE_BYTES)
        if raw.strip():
            yield number, raw


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
        value = json.loads(raw)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object {needed}")
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
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}{key!r} holds half of a surrogate pair, which is no text") from None
    return text


def _refuse_unknown(value: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(map(str, value.keys() - known))
    if unknown:
        raise ValueError(f"{where}unknown key {unknown[0]!r} (known: {', '.join(sorted(known))})")
