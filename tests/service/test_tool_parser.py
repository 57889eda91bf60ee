"""Calls out of text: the same whatever the pieces it comes in, and what is no call stays content."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import pytest

from service.api.tool_format import ToolFormat
from service.api.tool_parser import Accepts, CallSyntax, ContentDelta, ToolCallParser, read_whole, wire_delta

HERMES = ToolFormat("<tool_call>", "</tool_call>", "arguments")
LLAMA = ToolFormat("", "", "parameters")
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TRICKY = {"x": 'a "quoted" {brace} \\ and </tool_call> 🌱', "y": {"z": [{}, {"w": "}"}]}}
TRICKY_CALL = f"<tool_call>{json.dumps({'name': 'g', 'arguments': TRICKY}, ensure_ascii=False)}</tool_call>"


class Never:
    def accepts(self, text: str) -> bool:
        return False


def syntax(form: ToolFormat = HERMES, functions: Mapping[str, Accepts | None] | None = None) -> CallSyntax:
    return CallSyntax(form, functions or {"f": None, "g": None})


def whole(parser: ToolCallParser, text: str, cut: bool = False) -> tuple[str, list[tuple[str, Any]]]:
    content, calls = read_whole(parser, text, cut)
    functions: list[Any] = [call["function"] for call in calls]
    return content, [(function["name"], json.loads(function["arguments"])) for function in functions]


def streamed(parser: ToolCallParser, text: str, seed: int, cut: bool = False) -> tuple[str, list[tuple[str, Any]]]:
    """As the official client adds deltas up."""
    rng, content, calls = random.Random(seed), "", dict[int, list[str]]()
    deltas: list[Any] = []
    while text:
        length = rng.choice([1, 1, 2, 3, 7, 30])
        deltas += [wire_delta(delta) for delta in parser.feed(text[:length])]
        text = text[length:]
    for delta in [*deltas, *(wire_delta(delta) for delta in parser.finish(cut))]:
        content += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["id"].startswith("call_") and call["type"] == "function" and call["index"] == len(calls)
                calls[call["index"]] = [call["function"]["name"], ""]
            calls[call["index"]][1] += call["function"]["arguments"]
    return content, [(name, json.loads(arguments)) for name, arguments in calls.values()]


ANSWERS: list[tuple[str, str, list[tuple[str, Any]]]] = [
    ("plain text, <b>tags</b> and a < b", "plain text, <b>tags</b> and a < b", []),
    (CALL, "", [("f", {"x": 1})]),
    (TRICKY_CALL, "", [("g", TRICKY)]),
    (f"Let me see.\n\n{CALL}\n{TRICKY_CALL}\n", "Let me see.", [("f", {"x": 1}), ("g", TRICKY)]),
    (f"before {CALL} between {CALL} after", "before between after", [("f", {"x": 1})] * 2),
    ("<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
    ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',) * 2 + ([],),
    ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>',) * 2 + ([],),
    ('<tool_call>{"name": "f", "arguments": {}, "more": 1}</tool_call>',) * 2 + ([],),
    ("<tool_call>[1]</tool_call>",) * 2 + ([],),
    (f"<tool_call>broken</tool_call>{CALL}", "<tool_call>broken</tool_call>", [("f", {"x": 1})]),
    ('<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
    ("<tool_cal", "<tool_cal", []),
    ("<tool_call>{", "<tool_call>{", []),
    ("ends in white space \n", "ends in white space \n", []),
    (CALL.removesuffix("</tool_call>"), "", [("f", {"x": 1})]),
]


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS)
def test_calls_and_content_are_told_apart_however_the_text_arrives(
    text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    assert whole(syntax().parser(), text) == (content, calls)
    for seed in range(20):
        assert streamed(syntax().parser(), text, seed) == (content, calls)


def test_half_a_tag_is_never_sent_as_content() -> None:
    parser = syntax().parser()
    sent = [delta for character in f"Yes. {CALL}" for delta in parser.feed(character)]
    assert "".join(delta.text for delta in sent if isinstance(delta, ContentDelta)) == "Yes."


def test_a_call_that_was_cut_stays_content() -> None:
    text = CALL.removesuffix("</tool_call>")
    assert whole(syntax().parser(), text, cut=True) == (text, [])


def test_a_call_with_arguments_that_its_strict_schema_refuses_stays_content() -> None:
    assert whole(syntax(functions={"f": Never()}).parser(), CALL) == (CALL, [])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "f", "parameters": {"x": 1}}', "", [("f", {"x": 1})]),
        ('\n { "name" : "g", "parameters": {} }\n', "", [("g", {})]),
        ('{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
        ('{"nice": 1}', '{"nice": 1}', []),
        ("plain", "plain", []),
        ('{"name": "f", "parameters": ', '{"name": "f", "parameters": ', []),
    ],
)
def test_a_bare_call_is_an_answer_that_is_nothing_else(text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    assert whole(syntax(LLAMA).parser(), text) == (content, calls)
    for seed in range(10):
        assert streamed(syntax(LLAMA).parser(), text, seed) == (content, calls)


@pytest.mark.parametrize("form", [HERMES, LLAMA])
def test_calls_that_must_come_stream_their_arguments_as_they_come(form: ToolFormat) -> None:
    bound = CallSyntax(form, {"g": None}, must_call=True)
    call = form._call("g", TRICKY)
    text = f"{call}\n{call}" if form.begin else call
    expected = ("", [("g", TRICKY)] * (2 if form.begin else 1))
    assert whole(bound.parser(), text) == expected
    for seed in range(20):
        assert streamed(bound.parser(), text, seed) == expected
    parser, pieces = bound.parser(), 0
    for character in call:
        pieces += len(parser.feed(character))
    assert pieces > 20, "arguments must not wait for the call's end"


def test_a_bound_call_that_was_cut_keeps_what_it_has() -> None:
    parser = CallSyntax(HERMES, {"f": None}, must_call=True).parser()
    content, calls = read_whole(parser, '<tool_call>{"name": "f", "arguments": {"x": "ab', cut=True)
    assert content == "" and [call["function"] for call in calls] == [{"name": "f", "arguments": '{"x": "ab'}]
    parser = CallSyntax(HERMES, {"f": None}, must_call=True).parser()
    assert read_whole(parser, '<tool_call>{"na', cut=True) == ('<tool_call>{"na', [])
