"""How a base writes tool calls: seen from its chat template; how they are put into prompts and asked of a grammar.

Two forms are known, Hermes's (also Qwen's), `<tool_call>{"name", "arguments"}</tool_call>`, and Llama 3.1's, a bare
`{"name", "parameters"}`. A base whose template shows neither is told about Hermes's in a system message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from service.api.schemas import Message
from service.api.tools import Function, Tool, ToolCall
from service.engine.errors import ChatTemplateError
from service.engine.grammar_source import JSON_OPTIONS, GrammarSource, checked_schema, own_lark

MAX_CALLS = 32
"""Calls in one answer that must call."""

_SPACE = "W: /[ \\t\\n]{1,16}/"


class RendersChat(Protocol):
    """The part of `BaseModel` that is needed here."""

    @property
    def chat_template(self) -> str: ...
    @property
    def added_tokens(self) -> frozenset[str]: ...
    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]: ...


@dataclass(frozen=True)
class ToolFormat:
    """`begin` and `end` stand around a call; `arguments` is the name of its second field."""

    begin: str
    end: str
    arguments: str
    tags_are_tokens: bool = False
    renders_tools: bool = False
    renders_calls: bool = False

    @classmethod
    def of(cls, base: RendersChat) -> ToolFormat:
        """By a look at the template's text, and at what it does with tools, calls and their results."""
        renders_tools = _differ(base, [({"tools": None}), ({"tools": [_PROBE_TOOL]})])
        renders_calls = _differ(base, [_probe_call("a", "x"), _probe_call("b", "x")]) and _differ(
            base, [_probe_call("a", "x"), _probe_call("a", "y")]
        )
        template = base.chat_template
        if renders_tools and "<tool_call>" not in template and '"parameters":' in template.replace(" ", ""):
            return cls("", "", "parameters", False, renders_tools, renders_calls)
        are_tokens = {"<tool_call>", "</tool_call>"} <= base.added_tokens
        return cls("<tool_call>", "</tool_call>", "arguments", are_tokens, renders_tools, renders_calls)

    # -- prompts ----------------------------------------------------------------------------------------------

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Messages and tools as the base's template wants them."""
        defined = [tool.model_dump(exclude_none=True) for tool in tools]
        written = self._with_calls(messages) if self.renders_calls else self._as_text(messages)
        if not defined or self.renders_tools:
            return written, defined or None
        return _with_system(written, self._introduction(defined)), None

    def _with_calls(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        names = {call.id: call.function.name for message in messages for call in message.tool_calls or ()}
        written = []
        for message in messages:
            entry: dict[str, Any] = {"role": message.template_role, "content": message.text}
            if message.tool_calls:
                entry["tool_calls"] = [_template_call(call) for call in message.tool_calls]
            if message.tool_call_id is not None:
                entry |= {"tool_call_id": message.tool_call_id, "name": names[message.tool_call_id]}
            written.append(entry)
        return written

    def _as_text(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Calls as the model would write them; the results of one answer's calls as one message of the user."""
        written: list[dict[str, Any]] = []
        for role, group in groupby(messages, key=lambda message: message.template_role):
            if role == "tool":
                results = [f"<tool_response>\n{message.text}\n</tool_response>" for message in group]
                written.append({"role": "user", "content": "\n".join(results)})
            else:
                written += [{"role": role, "content": self._text(message)} for message in group]
        return written

    def _text(self, message: Message) -> str:
        calls = [self._call(call.function.name, _arguments(call)) for call in message.tool_calls or ()]
        return "\n".join([*([message.text] if message.text or not calls else []), *calls])

    def _call(self, name: str, arguments: object) -> str:
        body = json.dumps({"name": name, self.arguments: arguments}, ensure_ascii=False)
        return f"{self.begin}\n{body}\n{self.end}" if self.begin else body

    def _introduction(self, tools: list[dict[str, Any]]) -> str:
        functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        example = f'{self.begin}\n{{"name": "the function", "{self.arguments}": {{"its": "arguments"}}}}\n{self.end}'
        return (
            "These functions may be called. Each line describes one, its parameters as a JSON schema:\n"
            f"{functions}\nTo call a function, write nothing but:\n{example}"
        )

    # -- grammars ---------------------------------------------------------------------------------------------

    def calls_grammar(
        self, functions: Sequence[tuple[int, Function]], only_one: bool, content: GrammarSource | None = None
    ) -> GrammarSource:
        """One call or more, from the answer's first token on; or, if given, JSON that is no call."""
        several = "call" if only_one or not self.begin else f'call ("\\n" call){{0,{MAX_CALLS - 1}}}'
        start = f"start: {several}"
        if content is not None:
            start += f" | content\ncontent: %json {_with_options(content.text)}"
        begin, end = self._tag(self.begin), self._tag(self.end)
        return self._grammar(start, f"call: {begin} W? body W? {end}" if self.begin else "call: body", functions, True)

    def call_grammar(self, functions: Sequence[tuple[int, Function]]) -> GrammarSource:
        """What follows `begin` in an answer that may call; arguments of functions that are not strict stay open."""
        return self._grammar("start: call", f"call: W? body W? {self._tag(self.end)}", functions, False)

    def _grammar(self, start: str, call: str, functions: Sequence[tuple[int, Function]], bind: bool) -> GrammarSource:
        rules, bodies = [], []
        for index, function in functions:
            arguments = function.schema_of_arguments if bind or function.strict else {"type": "object"}
            schema = checked_schema(arguments, f"tools[{index}].function.parameters")
            rules.append(f"arguments_{index}: %json {_with_options(schema)}")
            name = json.dumps(json.dumps(function.name))
            key = json.dumps(json.dumps(self.arguments))
            bodies.append(f'"{{" W? "\\"name\\"" W? ":" W? {name} W? "," W? {key} W? ":" W? arguments_{index} W? "}}"')
        body = "body: " + "\n    | ".join(bodies)
        return own_lark("\n".join([start, call, body, *rules, _SPACE]), "tools")

    def _tag(self, tag: str) -> str:
        return tag if self.tags_are_tokens else json.dumps(tag)


def _with_options(schema: str) -> str:
    """A schema's text, made to be read as `grammar_source` has all schemas read."""
    options = f'{{"x-guidance":{json.dumps(JSON_OPTIONS)}'
    return f"{options}}}" if schema == "{}" else f"{options},{schema[1:]}"


_PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe", "description": "A probe.", "parameters": {"type": "object", "properties": {}}},
}


def _probe_call(argument: str, result: str) -> dict[str, Any]:
    call = {"id": "call00001", "type": "function", "function": {"name": "probe", "arguments": {"x": argument}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"messages": [answer, {"role": "tool", "content": result, "tool_call_id": "call00001", "name": "probe"}]}


def _differ(base: RendersChat, prompts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the template makes different prompts of them; False when it refuses one."""
    question = [{"role": "user", "content": "Hello"}]
    try:
        first, second = (base.render_chat([*question, *p.get("messages", ())], tools=p.get("tools")) for p in prompts)
    except ChatTemplateError:
        return False
    return first != second


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _template_call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": _arguments(call)},
    }


def _arguments(call: ToolCall) -> object:
    """Templates want an object; what a cut answer left of one stays text."""
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        return call.function.arguments
    return arguments if isinstance(arguments, dict) else call.function.arguments
