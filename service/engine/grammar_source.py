"""What an answer may be asked to follow, checked before anything is compiled. Knows no tokenizer and no thread.

A JSON schema, a regular expression, a list of choices or a Lark grammar becomes one text for llguidance. Bounds stand
here, and so does strictness: what llguidance would overlook in a schema is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from service.engine.errors import InvalidGrammarError

MAX_SOURCE_BYTES = 128 * 1024
MAX_REGEX_BYTES = 16 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_CHOICES = 1000
MAX_OPTIONAL_PROPERTIES = 256
"""Of one object. Any of them may come next, so a step's work grows with them."""

JSON_OPTIONS = {"lenient": False, "coerce_one_of": False, "whitespace_pattern": r"[ \t\n]{1,16}"}
"""White space between JSON's tokens is free but bounded: a model cannot spend its whole answer on line breaks."""

_TYPELESS = {"anyOf", "oneOf", "allOf", "$ref", "const", "enum", "type"}
_OF_ARRAYS = {"items", "additionalItems", "prefixItems", "minItems", "maxItems"}
_OF_OBJECTS = {"properties", "additionalProperties", "patternProperties", "required", "minProperties", "maxProperties"}
_OF_STRINGS = {"minLength", "maxLength", "pattern", "format"}
_OF_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_PLACES = {"$anchor", "$defs", "definitions", "$schema", "$id", "id"}
_ANNOTATIONS = {"$comment", "title", "description", "default", "deprecated", "readOnly", "writeOnly", "examples"}
_MORE_ANNOTATIONS = {"contentMediaType", "contentEncoding", "discriminator"}
_KNOWN = frozenset().union(
    _TYPELESS, _OF_ARRAYS, _OF_OBJECTS, _OF_STRINGS, _OF_NUMBERS, _PLACES, _ANNOTATIONS, _MORE_ANNOTATIONS
)
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SCHEMAS = ("items", "additionalItems", "additionalProperties")


class GrammarKind(StrEnum):
    """The languages llguidance reads."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True)
class GrammarSource:
    """A grammar as text, within bounds. `param` is the request's field to blame when it cannot be compiled.

    `tenant` is who asked: what is compiled for one is not kept for another, who could tell by the time it takes.
    """

    kind: GrammarKind
    text: str
    param: str
    tenant: str = ""


@dataclass(frozen=True)
class GrammarOrder:
    """How a compiled grammar is made again in another process; with `trigger` it holds behind that text only."""

    source: GrammarSource
    trigger: str | None = None
    max_uses: int | None = None


def json_schema(schema: Mapping[str, Any] | bool, param: str) -> GrammarSource:
    """Answers are JSON that the schema accepts. Raises InvalidGrammarError."""
    return GrammarSource(GrammarKind.JSON_SCHEMA, checked_schema(schema, param), param)


def json_object(param: str) -> GrammarSource:
    """Answers are any JSON object."""
    return GrammarSource(GrammarKind.JSON_SCHEMA, '{"type":"object"}', param)


def regex(pattern: str, param: str) -> GrammarSource:
    """The whole answer matches the pattern, in the syntax of Rust's `regex`: no look-around, no back-references."""
    if not pattern:
        raise InvalidGrammarError("the pattern is empty", param=param)
    _check_size(pattern, MAX_REGEX_BYTES, param)
    return GrammarSource(GrammarKind.REGEX, pattern, param)


def choice(choices: Sequence[str], param: str) -> GrammarSource:
    """The answer is one of the strings."""
    if not 0 < len(choices) <= MAX_CHOICES:
        raise InvalidGrammarError(f"give 1 to {MAX_CHOICES} choices, not {len(choices)}", param=param)
    if "" in choices:
        raise InvalidGrammarError("a choice may not be empty", param=param)
    text = "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in dict.fromkeys(choices))
    _check_size(text, MAX_SOURCE_BYTES, param)
    return GrammarSource(GrammarKind.LARK, text, param)


def lark(grammar: str, param: str) -> GrammarSource:
    """The answer is a sentence of a Lark grammar, in llguidance's dialect."""
    if "x-guidance" in grammar:
        raise InvalidGrammarError("'x-guidance' would loosen the grammar and is not taken", param=param)
    return own_lark(grammar, param)


def own_lark(grammar: str, param: str) -> GrammarSource:
    """A grammar that the service wrote itself, of parts that were checked."""
    _check_size(grammar, MAX_SOURCE_BYTES, param)
    return GrammarSource(GrammarKind.LARK, grammar, param)


def checked_schema(schema: Mapping[str, Any] | bool, param: str) -> str:
    """The schema as JSON text. Raises InvalidGrammarError for what is too large, too deep or would be overlooked."""
    try:
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError):
        raise InvalidGrammarError("the schema is not JSON, or nested too deeply to be read", param=param) from None
    _check_size(text, MAX_SOURCE_BYTES, param)
    for part in _subschemas(schema, param):
        unknown = sorted(part.keys() - _KNOWN)
        if unknown:
            raise InvalidGrammarError(f"the schema's keyword '{unknown[0]}' is not supported", param=param)
        if (num_optional := _num_optional(part)) > MAX_OPTIONAL_PROPERTIES:
            message = f"an object has {num_optional} optional properties; at most {MAX_OPTIONAL_PROPERTIES} are taken"
            raise InvalidGrammarError(f"{message}, and any number of required ones", param=param)
    return text


def _num_optional(schema: Mapping[str, Any]) -> int:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, Mapping):
        return 0
    return len(properties.keys() - (set(map(str, required)) if isinstance(required, list) else set()))


def _subschemas(root: Mapping[str, Any] | bool, param: str) -> Iterator[Mapping[str, Any]]:
    """Every schema inside `root` that is an object. What is malformed is left to the compiler's own message."""
    todo: list[tuple[object, int]] = [(root, 1)]
    while todo:
        schema, depth = todo.pop()
        if depth > MAX_SCHEMA_DEPTH:
            raise InvalidGrammarError(f"the schema is nested deeper than {MAX_SCHEMA_DEPTH} levels", param=param)
        if isinstance(schema, Mapping):
            yield schema
            todo += [(part, depth + 1) for part in _parts(schema)]


def _parts(schema: Mapping[str, Any]) -> Iterator[object]:
    for name in _SCHEMA_MAPS:
        if isinstance(schema.get(name), Mapping):
            yield from schema[name].values()
    for name in _SCHEMA_LISTS:
        if isinstance(schema.get(name), list):
            yield from schema[name]
    for name in _SCHEMAS:
        if isinstance(schema.get(name), Mapping):
            yield schema[name]


def _check_size(text: str, limit: int, param: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidGrammarError("it holds half of a surrogate pair", param=param) from None
    if size > limit:
        raise InvalidGrammarError(f"it has {size} bytes; at most {limit} are taken", param=param)
