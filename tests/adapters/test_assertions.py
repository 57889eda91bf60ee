"""The assertion language: what holds, what is no assertion, and that no pattern or schema stops the service."""

from __future__ import annotations

import time
from typing import Any

import pytest

from adapters.assertions import MAX_ASSERTIONS, AssertionSyntaxError, parse_assertion, parse_assertions


@pytest.mark.parametrize(
    ("assertion", "holds_for", "not_for"),
    [
        ({"contains": "thank you"}, "well, thank you!", "Thank You"),
        ({"not_contains": "sorry"}, "fine", "so sorry"),
        ({"regex": r"^[A-Z]{2}\d+$"}, "AB12", "xAB12"),
        ({"regex": r"\d"}, "in 7 days", "in seven days"),
        ({"max_length": 3}, "äöü", "abcd"),
        ({"json_schema": {"type": "object", "required": ["a"]}}, '{"a": null}', '{"b": 1}'),
        ({"json_schema": {"type": "integer"}}, " 4 ", "four"),
        ({"json_schema": {"properties": {"n": {"pattern": "^a+$"}}}}, '{"n": "aa"}', '{"n": "b"}'),
        ({"json_schema": {"$defs": {"n": {"type": "number"}}, "items": {"$ref": "#/$defs/n"}}}, "[1]", '["1"]'),
        ({"json_schema": False}, None, "1"),
    ],
)
def test_an_assertion_holds_or_does_not(assertion: Any, holds_for: str | None, not_for: str) -> None:
    parsed = parse_assertion(assertion, "assertions[0]")
    assert holds_for is None or parsed.holds(holds_for)
    assert not parsed.holds(not_for)
    assert parsed.as_dict() == assertion


@pytest.mark.parametrize(
    ("value", "where", "said"),
    [
        ("contains", "assertions", "must be a list"),
        ([{"contains": "a"}, {"equals": "b"}], "assertions[1].equals", "known: contains, not_contains"),
        ([{}], "assertions[0]", "one key"),
        ([{"contains": "a", "regex": "b"}], "assertions[0]", "one key"),
        ([{"contains": ""}], "assertions[0].contains", "1 to 4096"),
        ([{"regex": "(a"}], "assertions[0].regex", "no pattern"),
        ([{"max_length": -1}], "assertions[0].max_length", "number"),
        ([{"max_length": True}], "assertions[0].max_length", "number"),
        ([{"json_schema": {"type": "objekt"}}], "assertions[0].json_schema", "no JSON schema"),
        ([{"json_schema": "{}"}], "assertions[0].json_schema", "must be a JSON schema"),
        ([{"json_schema": {"$ref": "http://example.org/s"}}], "assertions[0].json_schema", "within the schema"),
        ([{"json_schema": {"patternProperties": {}}}], "assertions[0].json_schema", "not supported"),
        ([{"json_schema": {"pattern": "("}}], "assertions[0].json_schema.pattern", "no pattern"),
        ([{"json_schema": {"title": "x" * 70_000}}], "assertions[0].json_schema", "longer than"),
        ([{"max_length": 1}] * (MAX_ASSERTIONS + 1), "assertions", "at most"),
    ],
)
def test_what_is_no_assertion_is_refused_by_name(value: Any, where: str, said: str) -> None:
    with pytest.raises(AssertionSyntaxError) as caught:
        parse_assertions(value, "assertions")
    assert caught.value.where == where
    assert said in caught.value.reason


def test_a_schema_nested_without_end_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(200):
        schema = {"not": schema}
    with pytest.raises(AssertionSyntaxError, match="nested deeper"):
        parse_assertion({"json_schema": schema}, "a")


def _fan_out() -> dict[str, Any]:
    """Forty lines that ask for 2**39 checks."""
    steps = {f"x{i}": {"allOf": [{"$ref": f"#/$defs/x{i - 1}"}] * 2} for i in range(1, 40)}
    return {"$defs": {"x0": {"type": "integer"}, **steps}, "$ref": "#/$defs/x39"}


@pytest.mark.parametrize(
    ("assertion", "answer"),
    [
        ({"regex": r"^(\w+\s?)*$"}, "word " * 60 + "!"),
        ({"json_schema": {"pattern": r"^(a|a)*$"}}, '"' + "a" * 200 + 'b"'),
        ({"json_schema": _fan_out()}, "1"),
        ({"json_schema": {"$ref": "#"}}, "1"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "1"),
    ],
)
def test_a_check_that_would_never_end_does_not_hold(assertion: Any, answer: str) -> None:
    parsed = parse_assertion(assertion, "a")
    started = time.monotonic()
    assert not parsed.holds(answer)
    assert time.monotonic() - started < 2
