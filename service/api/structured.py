"""What shape an answer shall have: OpenAI's `response_format`, vLLM's `structured_outputs`. Knows no engine thread.

Both become one `GrammarSource`; the compiler decides whether it can be followed.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from service.api.wire import Unsupported, WireModel, field_error
from service.engine import grammar_source
from service.engine.grammar_source import GrammarSource

Schema = dict[str, Any]


class JsonSchemaFormat(WireModel):
    """`strict` changes nothing here: the schema is always kept to."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(WireModel):
    """OpenAI's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise field_error("json_schema", "belongs to the type 'json_schema', and the type to it")
        return self


def _parsed(value: object) -> object:
    """vLLM's clients may send a schema as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("must be a JSON schema") from None


class StructuredOutputs(WireModel):
    """vLLM's: exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`."""

    json_: Annotated[Schema | None, BeforeValidator(_parsed)] = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    unsupported: ClassVar[Unsupported] = {
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
        "structural_tag": (),
    }

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        asked = [self.json_, self.regex, self.choice, self.grammar, self.json_object or None]
        if sum(each is not None for each in asked) != 1:
            raise ValueError("give exactly one of 'json', 'regex', 'choice', 'grammar' and 'json_object'")
        return self

    @property
    def is_json(self) -> bool:
        return self.json_ is not None or bool(self.json_object)


def format_source(response_format: ResponseFormat | None, structured: StructuredOutputs | None) -> GrammarSource | None:
    """The grammar that a request asks for, if any. Raises InvalidGrammarError."""
    if structured is not None:
        return _of_structured_outputs(structured)
    if response_format is None or response_format.type == "text":
        return None
    asked = response_format.json_schema
    if asked is None or asked.schema_ is None:
        return grammar_source.json_object("response_format")
    return grammar_source.json_schema(asked.schema_, "response_format.json_schema.schema")


def _of_structured_outputs(asked: StructuredOutputs) -> GrammarSource:
    if asked.json_ is not None:
        return grammar_source.json_schema(asked.json_, "structured_outputs.json")
    if asked.regex is not None:
        return grammar_source.regex(asked.regex, "structured_outputs.regex")
    if asked.choice is not None:
        return grammar_source.choice(asked.choice, "structured_outputs.choice")
    if asked.grammar is not None:
        return grammar_source.lark(asked.grammar, "structured_outputs.grammar")
    return grammar_source.json_object("structured_outputs.json_object")
