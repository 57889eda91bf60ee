"""What may be asked for: each refusal names its field, and nothing of a schema is overlooked."""

from __future__ import annotations

from typing import Any

import pytest

from service.engine import grammar_source
from service.engine.errors import InvalidGrammarError
from service.engine.grammar_source import MAX_CHOICES, MAX_REGEX_BYTES, MAX_SCHEMA_DEPTH, GrammarKind


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"type": "array", "items": schema}
    return schema


def test_a_schema_in_every_known_word_is_taken_as_it_is() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": {"name": {"type": "string", "maxLength": 3}},
        "title": "Person",
        "type": "object",
        "properties": {"type": {"$ref": "#/$defs/name"}, "anything at all": {"enum": [1, {"unknown": 2}]}},
        "required": ["type"],
        "additionalProperties": False,
    }
    source = grammar_source.json_schema(schema, "p")
    assert (source.kind, source.param) == (GrammarKind.JSON_SCHEMA, "p")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "object", "properties": {"a": {"type": "string", "nullable": True}}}, "'nullable'"),
        ({"anyOf": [{"type": "string", "minLen": 3}]}, "'minLen'"),
        ({"x-guidance": {"lenient": True}, "type": "string"}, "'x-guidance'"),
        ({"type": "array", "items": {"uniqueItems": True}}, "'uniqueItems'"),
        ({"$defs": {"a": {"not": {}}}}, "'not'"),
        ({"additionalProperties": {"propertyNames": {}}}, "'propertyNames'"),
        (nested(MAX_SCHEMA_DEPTH + 1), "nested deeper"),
        ({"properties": {f"p{i}": {} for i in range(300)}, "required": ["p1"]}, "299 optional"),
        ({"enum": ["x" * 200_000]}, "bytes"),
        ({"const": "\ud800"}, "surrogate"),
        ({"const": float("nan")}, "nested"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_by_name(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidGrammarError, match=said) as caught:
        grammar_source.json_schema(schema, "response_format.json_schema.schema")
    assert caught.value.param == "response_format.json_schema.schema"


def test_a_schema_may_be_nested_to_the_bound() -> None:
    assert grammar_source.json_schema(nested(MAX_SCHEMA_DEPTH), "p").text


@pytest.mark.parametrize(
    "ask",
    [
        lambda: grammar_source.regex("", "p"),
        lambda: grammar_source.regex("a" * (MAX_REGEX_BYTES + 1), "p"),
        lambda: grammar_source.choice([], "p"),
        lambda: grammar_source.choice(["a", ""], "p"),
        lambda: grammar_source.choice([str(i) for i in range(MAX_CHOICES + 1)], "p"),
        lambda: grammar_source.choice(["x" * 200_000], "p"),
        lambda: grammar_source.lark('start: %json {"x-guidance": {"lenient": true}}', "p"),
        lambda: grammar_source.lark("x" * 200_000, "p"),
    ],
)
def test_patterns_choices_and_grammars_have_bounds(ask: Any) -> None:
    with pytest.raises(InvalidGrammarError) as caught:
        ask()
    assert caught.value.param == "p"


def test_a_schema_as_deep_as_python_can_recurse_is_refused_and_not_crashed_on() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(InvalidGrammarError):
        grammar_source.json_schema(schema, "p")
