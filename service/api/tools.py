"""Function tools on the wire: their definitions, which may be called, and the calls themselves. Knows no template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from service.api.wire import WireModel, field_error

MAX_TOOLS = 128

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(WireModel):
    """`strict` binds its arguments to `parameters` also where the model is free to call or not."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _parameters_are_an_object(self) -> Self:
        if self.parameters is not None and self.parameters.get("type", "object") != "object":
            raise field_error("parameters", "must be the schema of an object")
        return self

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """Arguments are always an object; a function without parameters takes an empty one."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(WireModel):
    type: Literal["function"]
    function: Function


class FunctionChoice(WireModel):
    name: FunctionName


def _as_object(value: object) -> object:
    """`"auto"` as `{"type": "auto"}`, so that a complaint names the field and no branch of a union."""
    if isinstance(value, dict) and value.get("type") != "function":
        raise ValueError("must be 'none', 'auto', 'required' or a function to call")
    return {"type": value} if isinstance(value, str) and value != "function" else value


class ToolChoice(WireModel):
    type: Literal["none", "auto", "required", "function"]
    function: FunctionChoice | None = None

    @model_validator(mode="after")
    def _function_with_its_type(self) -> Self:
        if (self.type == "function") != (self.function is not None):
            raise field_error("function", "name the function to call")
        return self


class FunctionCall(WireModel):
    name: FunctionName
    arguments: str


class ToolCall(WireModel):
    """A call in an earlier answer."""

    id: str = Field(min_length=1, max_length=128)
    type: Literal["function"]
    function: FunctionCall


class ToolParams(WireModel):
    """The fields of a chat request about tools."""

    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Annotated[ToolChoice | None, BeforeValidator(_as_object)] = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _choice_fits_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise field_error("tools", "two functions have the same name")
        choice = self.tool_choice
        if not names and choice is not None and choice.type != "none":
            raise field_error("tool_choice", "only allowed when 'tools' are given")
        if not names and self.parallel_tool_calls is not None:
            raise field_error("parallel_tool_calls", "only allowed when 'tools' are given")
        if choice is not None and choice.function is not None and choice.function.name not in names:
            raise field_error("tool_choice", f"there is no function '{choice.function.name}' among the tools")
        return self

    @property
    def may_call(self) -> bool:
        return bool(self.tools) and (self.tool_choice is None or self.tool_choice.type != "none")

    @property
    def must_call(self) -> bool:
        return self.may_call and self.tool_choice is not None and self.tool_choice.type != "auto"

    @property
    def only_one_call(self) -> bool:
        named = self.tool_choice is not None and self.tool_choice.function is not None
        return named or self.parallel_tool_calls is False

    @property
    def callable_functions(self) -> Sequence[tuple[int, Function]]:
        """What may be called, each with its place in `tools`."""
        named = self.tool_choice.function if self.tool_choice is not None else None
        every = [(index, tool.function) for index, tool in enumerate(self.tools or ())]
        return [(i, f) for i, f in every if named is None or f.name == named.name]
