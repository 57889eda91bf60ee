"""Hostile patterns and schemas: small to write, endless to follow."""

from __future__ import annotations

from typing import Any

from tests.hostile.cases import Case, Request, chat, job

_RECURSIVE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
_FANS_OUT: dict[str, Any] = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 10} for n in range(20)}
_MIXED: list[Any] = [*range(9000), {}]
"""Not sortable, so that comparing all pairs is what remains."""


def _regex(pattern: str) -> Request:
    return chat(structured_outputs={"regex": pattern})


def _schema(schema: Any) -> Request:
    return chat(structured_outputs={"json": schema})


def _checks(*assertions: Any) -> Request:
    return job(evaluation={"assertions": list(assertions)})


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


_REGEX, _JSON = "structured_outputs.regex", "structured_outputs.json"
_FIRST = "evaluation.assertions[0]"

CASES = [
    Case("a pattern that backtracks for ever", _regex("(a+)+$"), 200),
    Case("a pattern that explodes", _regex("((a{1,1000}){1,1000}){1,1000}"), 200),
    Case("a pattern of 100 kB", _regex("a" * 100_000), param=_REGEX),
    Case("a pattern that is none", _regex("(((("), param=_REGEX),
    Case("a pattern that looks back", _regex(r"(a)\1"), param=_REGEX),
    Case("an empty pattern", _regex(""), param=_REGEX),
    Case("5000 brackets", _regex("(" * 5000 + "a" + ")" * 5000), param=_REGEX),
    Case("a schema that is its own definition", _schema(_RECURSIVE), param=_JSON),
    Case("a schema from elsewhere", _schema({"$ref": "http://169.254.169.254/schema"}), param=_JSON),
    Case("a schema from this machine", _schema({"$ref": "file:///etc/passwd"}), param=_JSON),
    Case("40 levels of a schema", _schema(_deep(40)), param=_JSON),
    Case("a schema of 200 kB", _schema({"enum": [f"value {n}" for n in range(20_000)]}), param=_JSON),
    Case("a schema of 10^9 items", _schema({"type": "array", "minItems": 10**9}), 200),
    Case("a schema of nonsense", _schema({"type": "elephant"}), param=_JSON),
    Case(
        "10 000 choices",
        chat(structured_outputs={"choice": [str(n) for n in range(10_000)]}),
        param="structured_outputs.choice",
    ),
    Case(
        "a grammar that never ends",
        chat(structured_outputs={"grammar": "start: start start"}),
        param="structured_outputs.grammar",
    ),
    Case(
        "a grammar that loosens itself",
        chat(structured_outputs={"grammar": 'start: %json {"x-guidance": {"lenient": true}}'}),
        param="structured_outputs.grammar",
    ),
    Case(
        "a tool's parameters from elsewhere",
        chat(
            tools=[
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {"$ref": "http://10.0.0.1/"}, "strict": True},
                }
            ]
        ),
        param="tools[0].function.parameters",
    ),
    Case(
        "a tool's name with a line break",
        chat(tools=[{"type": "function", "function": {"name": "f\n"}}]),
        param="tools[0].function.name",
    ),
    Case("an assertion that is no pattern", _checks({"regex": "("}), param=f"{_FIRST}.regex"),
    Case(
        "an assertion's pattern that explodes",
        _checks({"regex": "(?:(?:a{1,9999}){1,9999}){1,9999}" * 100}),
        param=None,
        status=200,
    ),
    Case(
        "an assertion's schema from elsewhere",
        _checks({"json_schema": {"$ref": "http://10.0.0.1/"}}),
        param=f"{_FIRST}.json_schema",
    ),
    Case(
        "an assertion's schema with an address",
        _checks({"json_schema": {"$id": "http://10.0.0.1/"}}),
        param=f"{_FIRST}.json_schema",
    ),
    Case(
        "an assertion's schema that compares all pairs",
        _checks({"json_schema": {"required": _MIXED}}),
        param=f"{_FIRST}.json_schema",
    ),
    Case(
        "an assertion's schema of 70 kB",
        _checks({"json_schema": {"enum": ["a" * 70_000]}}),
        param=f"{_FIRST}.json_schema",
    ),
    Case("70 levels of an assertion's schema", _checks({"json_schema": _deep(70)}), param=f"{_FIRST}.json_schema"),
    Case("1000 assertions", _checks(*[{"contains": "a"}] * 1000), param="evaluation.assertions"),
    Case("an assertion without a name", _checks({}), param=_FIRST),
]
