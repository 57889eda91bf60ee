"""An answer's text, as it comes, to content and tool calls. Knows the form of calls, not the stream they go into.

What looks like a call and is none stays content. Half a tag is held back until it is known what it becomes.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from service.api.tool_format import ToolFormat


class Accepts(Protocol):
    """A grammar, as far as it is needed here."""

    def accepts(self, text: str) -> bool: ...


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """The beginning of a call, with `id` and `name`, or more of its arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


Delta = ContentDelta | CallDelta


@dataclass(frozen=True)
class CallSyntax:
    """What a call of this request looks like. `functions` maps each name to the grammar of strict arguments."""

    format: ToolFormat
    functions: Mapping[str, Accepts | None]
    must_call: bool = False

    def parser(self) -> ToolCallParser:
        if self.must_call:
            return BoundCalls(self.format)
        return FreeCalls(self) if self.format.begin else BareCall(self)

    def parse(self, text: str) -> tuple[str, str] | None:
        """Name and arguments of a call's body; None when it is none."""
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or call.get("name") not in self.functions:
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(arguments, dict) or not call.keys() <= {"name", "type", "arguments", "parameters"}:
            return None
        written = json.dumps(arguments, ensure_ascii=False)
        strict = self.functions[call["name"]]
        return (call["name"], written) if strict is None or strict.accepts(written) else None


class ToolCallParser(Protocol):
    """`feed` with text as it comes, then `finish` once; `num_calls` have begun so far."""

    num_calls: int

    def feed(self, text: str) -> list[Delta]: ...
    def finish(self, cut: bool) -> list[Delta]: ...


@dataclass
class FreeCalls:
    """Calls between tags in free text. A call is sent when it is whole and right."""

    syntax: CallSyntax
    num_calls: int = 0
    _held: str = ""
    _inside: bool = False

    def feed(self, text: str) -> list[Delta]:
        self._held += text
        deltas: list[Delta] = []
        while (step := self._leave() if self._inside else self._enter()) is not None:
            deltas += step
        if not self._inside:
            deltas += self._send(len(self._held) - self._undecided())
        return deltas

    def finish(self, cut: bool) -> list[Delta]:
        """An answer that ends by itself inside a call may leave the closing tag away."""
        if self._inside and not cut and (call := self._called(self._held)):
            self._held = ""
            return call
        held, self._held = (self.syntax.format.begin if self._inside else "") + self._held, ""
        return [ContentDelta(held)] if held and not (self.num_calls and held.isspace()) else []

    def _enter(self) -> list[Delta] | None:
        begin = self.syntax.format.begin
        at = self._held.find(begin)
        if at < 0:
            return None
        before, self._held, self._inside = self._held[:at].rstrip(), self._held[at + len(begin) :], True
        return [ContentDelta(before)] if before else []

    def _leave(self) -> list[Delta] | None:
        end, start = self.syntax.format.end, 0
        while (at := self._held.find(end, start)) >= 0:
            body, start = self._held[:at], at + len(end)
            call = self._called(body)
            if call is None and _ends_in_string(body):
                continue  # the tag is part of an argument
            self._held, self._inside = self._held[start:], False
            return call or [ContentDelta(f"{self.syntax.format.begin}{body}{end}")]
        return None

    def _called(self, body: str) -> list[Delta] | None:
        call = self.syntax.parse(body)
        if call is None:
            return None
        self.num_calls += 1
        return _whole_call(self.num_calls - 1, *call)

    def _undecided(self) -> int:
        """Length of the tail that may belong to a call: white space before it, and the start of its tag."""
        begin = self.syntax.format.begin
        tag = next(
            (n for n in range(min(len(begin) - 1, len(self._held)), 0, -1) if begin.startswith(self._held[-n:])), 0
        )
        before = self._held[: len(self._held) - tag]
        return tag + len(before) - len(before.rstrip())

    def _send(self, until: int) -> list[Delta]:
        text, self._held = self._held[:until], self._held[until:]
        return [ContentDelta(text)] if text else []


@dataclass
class BareCall:
    """An answer that is one call and nothing else, without tags. Known at its end."""

    syntax: CallSyntax
    num_calls: int = 0
    _held: str = ""
    _is_content: bool = False

    _BEGINNING = '{"name":'

    def feed(self, text: str) -> list[Delta]:
        self._held += text
        squeezed = re.sub(r"\s", "", self._held[:200])[: len(self._BEGINNING)]
        self._is_content = self._is_content or not self._BEGINNING.startswith(squeezed)
        return self._all() if self._is_content else []

    def finish(self, cut: bool) -> list[Delta]:
        call = None if self._is_content else self.syntax.parse(self._held)
        if call is None:
            return self._all()
        self.num_calls = 1
        return _whole_call(0, *call)

    def _all(self) -> list[Delta]:
        text, self._held = self._held, ""
        return [ContentDelta(text)] if text else []


@dataclass
class BoundCalls:
    """Calls that a grammar has made sure of: arguments go out as they come. A cut answer ends inside them."""

    format: ToolFormat
    num_calls: int = 0
    _held: str = ""
    _arguments: _ObjectEnd | None = None
    _header: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        begin, key = re.escape(self.format.begin), re.escape(self.format.arguments)
        self._header = re.compile(rf'\s*{begin}\s*\{{\s*"name"\s*:\s*"([^"]+)"\s*,\s*"{key}"\s*:\s*(?=\{{)')

    def feed(self, text: str) -> list[Delta]:
        self._held += text
        deltas: list[Delta] = []
        while self._held:
            if self._arguments is not None:
                deltas.append(self._more_arguments(self._arguments))
                continue
            found = self._header.search(self._held)
            if found is None:
                break
            self._held, self._arguments = self._held[found.end() :], _ObjectEnd()
            deltas.append(CallDelta(self.num_calls, id=_new_id(), name=found[1]))
            self.num_calls += 1
        return deltas

    def finish(self, cut: bool) -> list[Delta]:
        """What was cut before a first call had a name is content; behind a call there are only its brackets."""
        return [ContentDelta(self._held)] if self._held and not self.num_calls else []

    def _more_arguments(self, scanner: _ObjectEnd) -> Delta:
        until = scanner.find(self._held)
        if until is not None:
            self._arguments = None
        piece, self._held = self._held[:until], "" if until is None else self._held[until:]
        return CallDelta(self.num_calls - 1, arguments=piece)


@dataclass
class _ObjectEnd:
    """Looks for the end of a JSON object that arrives in pieces."""

    depth: int = 0
    in_string: bool = False
    escaped: bool = False

    def find(self, piece: str) -> int | None:
        """Where in `piece` the object ends; None when it goes on."""
        for position, character in enumerate(piece):
            if self.escaped:
                self.escaped = False
            elif self.in_string:
                self.escaped, self.in_string = character == "\\", character != '"'
            elif character == '"':
                self.in_string = True
            elif character in "{}":
                self.depth += 1 if character == "{" else -1
                if self.depth == 0:
                    return position + 1
        return None


def _ends_in_string(text: str) -> bool:
    scanner = _ObjectEnd(depth=1 << 30)
    scanner.find(text)
    return scanner.in_string


def _whole_call(index: int, name: str, arguments: str) -> list[Delta]:
    return [CallDelta(index, id=_new_id(), name=name), CallDelta(index, arguments=arguments)]


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def read_whole(parser: ToolCallParser, text: str, cut: bool) -> tuple[str, list[dict[str, object]]]:
    """The content and the `tool_calls` of an answer that is there at once."""
    content, calls = "", list[dict[str, object]]()
    for delta in [*parser.feed(text), *parser.finish(cut)]:
        if isinstance(delta, ContentDelta):
            content += delta.text
        elif delta.id is not None:
            calls.append({"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}})
        else:
            function = calls[delta.index]["function"]
            assert isinstance(function, dict)
            function["arguments"] += delta.arguments
    return content, calls


def wire_delta(delta: Delta) -> dict[str, object]:
    """`choices[].delta` of a chunk."""
    if isinstance(delta, ContentDelta):
        return {"content": delta.text}
    call: dict[str, object] = {"index": delta.index}
    if delta.id is not None:
        call |= {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
    else:
        call["function"] = {"arguments": delta.arguments}
    return {"tool_calls": [call]}
