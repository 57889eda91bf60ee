"""What an answer must be like, whatever was expected: a small language of checks. Knows no model and no file.

Each assertion is an object with one key:

    {"contains": "thank you"}     {"not_contains": "sorry"}     {"max_length": 200}     (characters)
    {"regex": "^[A-Z]{2}\\d+$"}    searched anywhere in the answer; anchors say otherwise
    {"json_schema": {…}}          the answer is JSON that the schema (draft 2020-12) accepts

Patterns and schemas come from strangers, so both are bounded: a pattern by time, a schema by its size, by local
references only, and by how many of them one check may follow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import regex
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable

KINDS = ("contains", "not_contains", "regex", "json_schema", "max_length")
MAX_ASSERTIONS = 32
MAX_TEXT_CHARACTERS = 4096
MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64
MAX_REFERENCES_FOLLOWED = 1000
REGEX_SECONDS = 0.02

_UNBOUNDED_KEYWORDS = ("patternProperties", "$dynamicRef", "$recursiveRef", "$id", "$anchor", "$dynamicAnchor")

_DISTINCT_LISTS = ("required", "type", "dependentRequired")


class AssertionSyntaxError(ValueError):
    """Not an assertion. `where` is the path of what is wrong: `assertions[2].regex`."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason


@dataclass(frozen=True)
class Assertion:
    """One check. `value` is a text, a number of characters, or a schema as JSON text."""

    kind: str
    value: str | int

    def as_dict(self) -> dict[str, Any]:
        return {self.kind: json.loads(str(self.value)) if self.kind == "json_schema" else self.value}

    def holds(self, answer: str) -> bool:
        """A pattern or schema that takes too long does not hold."""
        if self.kind == "max_length":
            return len(answer) <= int(self.value)
        text = str(self.value)
        if self.kind == "regex":
            return _matches(text, answer)
        if self.kind == "json_schema":
            return _fits(json.loads(text), answer)
        return (text in answer) is (self.kind == "contains")


def parse_assertions(value: Any, where: str) -> tuple[Assertion, ...]:
    """Raises AssertionSyntaxError naming the part to blame, from `where` on."""
    if not isinstance(value, list):
        raise AssertionSyntaxError(where, "must be a list of assertions")
    if len(value) > MAX_ASSERTIONS:
        raise AssertionSyntaxError(where, f"has {len(value)} entries, at most {MAX_ASSERTIONS} are allowed")
    return tuple(parse_assertion(item, f"{where}[{index}]") for index, item in enumerate(value))


def parse_assertion(value: Any, where: str) -> Assertion:
    if not isinstance(value, Mapping) or len(value) != 1:
        raise AssertionSyntaxError(where, f"must be an object with one key of {', '.join(KINDS)}")
    ((kind, argument),) = value.items()
    where = f"{where}.{kind}"
    if kind not in KINDS:
        raise AssertionSyntaxError(where, f"is no assertion (known: {', '.join(KINDS)})")
    if kind == "json_schema":
        return Assertion(kind, _checked_schema(argument, where))
    if kind == "max_length":
        if isinstance(argument, bool) or not isinstance(argument, int) or argument < 0:
            raise AssertionSyntaxError(where, "must be a number of characters")
        return Assertion(kind, argument)
    if not isinstance(argument, str) or not 1 <= len(argument) <= MAX_TEXT_CHARACTERS:
        raise AssertionSyntaxError(where, f"must be a text of 1 to {MAX_TEXT_CHARACTERS} characters")
    if kind == "regex":
        _compiled(argument, where)
    return Assertion(kind, argument)


def _compiled(pattern: str, where: str) -> None:
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise AssertionSyntaxError(where, f"is no pattern: {error}") from None


def _matches(pattern: str, text: str) -> bool:
    """`concurrent` lets other threads run meanwhile, `timeout` ends a pattern that backtracks for ever."""
    try:
        return regex.search(pattern, text, timeout=REGEX_SECONDS, concurrent=True) is not None
    except TimeoutError:
        return False


def _checked_schema(schema: Any, where: str) -> str:
    if not isinstance(schema, Mapping | bool):
        raise AssertionSyntaxError(where, "must be a JSON schema")
    try:
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA_BYTES:
            raise AssertionSyntaxError(where, f"is longer than {MAX_SCHEMA_BYTES} bytes")
        for key, value, depth in _keywords(schema, 0):
            if depth > MAX_SCHEMA_DEPTH:
                raise AssertionSyntaxError(where, f"is nested deeper than {MAX_SCHEMA_DEPTH}")
            if key in _UNBOUNDED_KEYWORDS:
                raise AssertionSyntaxError(where, f"uses '{key}', which is not supported here")
            if key == "$ref" and not str(value).startswith("#"):
                raise AssertionSyntaxError(
                    where, f"refers to '{value}': only references within the schema are followed"
                )
            if key in _DISTINCT_LISTS and isinstance(value, list) and not all(isinstance(item, str) for item in value):
                raise AssertionSyntaxError(where, f"'{key}' must be a list of texts")  # others are compared in pairs
            if key == "pattern" and isinstance(value, str):
                _compiled(value, f"{where}.pattern")
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise AssertionSyntaxError(where, f"is no JSON schema: {error.message[:200]}") from None
    except RecursionError:
        raise AssertionSyntaxError(where, "is nested too deep") from None
    return text


def _keywords(value: Any, depth: int) -> Iterator[tuple[str, Any, int]]:
    """Every key anywhere in the schema. A property of that name is taken for a keyword, too: rather refuse."""
    if depth > MAX_SCHEMA_DEPTH:
        yield "", None, depth
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key), item, depth
            yield from _keywords(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _keywords(item, depth + 1)


class _TooMuchWorkError(Exception):
    """References that fan out: a few lines of schema can ask for more steps than there are seconds."""


def _fits(schema: Any, answer: str) -> bool:
    try:
        value = json.loads(answer)
        return bool(_bounded_validator()(schema, registry=Registry()).is_valid(value))
    except (ValueError, RecursionError, Unresolvable, _TooMuchWorkError):
        return False


def _bounded_validator() -> Any:
    """A validator class for one check, which counts its references and matches patterns under the time limit."""
    num_followed = 0
    follow = Draft202012Validator.VALIDATORS["$ref"]

    def reference(validator: Any, target: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        nonlocal num_followed
        num_followed += 1
        if num_followed > MAX_REFERENCES_FOLLOWED:
            raise _TooMuchWorkError
        yield from follow(validator, target, instance, schema) or ()

    def pattern(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        if isinstance(instance, str) and not _matches(wanted, instance):
            yield ValidationError(f"does not match {wanted!r}")

    return extend(Draft202012Validator, {"$ref": reference, "pattern": pattern})
