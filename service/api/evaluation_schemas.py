"""What a job may ask of its evaluation and its gate, and the bounds of it. Knows no table and no trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, WrapValidator, model_validator

from adapters.assertions import AssertionSyntaxError, parse_assertions
from adapters.gate import FewExamples, GatePolicy
from adapters.scoring import TaskKind
from service.api.wire import WireModel, field_error
from service.job import EvaluationSpec

MAX_EXAMPLES = 2000
MAX_SHOTS = 32
MAX_SECONDS = 3600.0
OFF = "off"

Share = Annotated[float, Field(ge=0, le=1)]
Gain = Annotated[float, Field(ge=-1, le=1)]


class EvaluationRequest(WireModel):
    """`evaluation` of a job; see `service.job.EvaluationSpec`."""

    file: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    max_examples: int | None = Field(None, ge=1, le=MAX_EXAMPLES)
    max_seconds: float | None = Field(None, gt=0, le=MAX_SECONDS)
    num_shots: int | None = Field(None, ge=0, le=MAX_SHOTS)
    task: Literal["auto", "labels", "json", "text"] | None = None
    assertions: list[Any] | None = None

    @model_validator(mode="after")
    def _assertions_parse(self) -> Self:
        try:
            parse_assertions(self.assertions or [], "assertions")
        except AssertionSyntaxError as error:
            raise field_error(error.where, error.reason) from None
        return self

    @property
    def requested(self) -> EvaluationSpec:
        numbers: dict[str, Any] = {
            "max_examples": self.max_examples,
            "max_seconds": self.max_seconds,
            "num_shots": self.num_shots,
        }
        return replace(
            EvaluationSpec(
                file=self.file,
                task=None if self.task in (None, "auto") else TaskKind(str(self.task)),
                assertions=parse_assertions(self.assertions or [], "assertions"),
            ),
            **{name: value for name, value in numbers.items() if value is not None},
        )


class GateRequest(WireModel):
    """A gate policy, or what differs from one; see `adapters.gate.GatePolicy`."""

    enabled: bool | None = None
    min_gain_over_base: Gain | None = None
    min_gain_over_few_shot: Gain | None = None
    max_p: Annotated[float, Field(gt=0, le=1)] | None = None
    must_not_lose_to_active: bool | None = None
    min_gain_over_active: Gain | None = None
    max_forgetting: Annotated[float, Field(gt=0)] | None = None
    min_worst_slice: Share | None = None
    min_assertions: Share | None = None
    min_examples: int | None = Field(None, ge=1, le=MAX_EXAMPLES)
    few_examples: Literal["pass", "hold", "pass_if_first"] | None = None

    def applied_to(self, policy: GatePolicy) -> GatePolicy:
        """`policy` with the fields that were sent. Null lifts a condition; where there must be one, it asks for the
        default."""
        asked = {name: getattr(self, name) for name in self.model_fields_set}
        defaults = GatePolicy()
        for name in ("enabled", "max_p", "must_not_lose_to_active", "min_examples", "few_examples"):
            if name in asked and asked[name] is None:
                asked[name] = getattr(defaults, name)
        if "few_examples" in asked:
            asked["few_examples"] = FewExamples(asked["few_examples"])
        return replace(policy, **asked)


def _off_or(value: Any, validate: Callable[[Any], Any]) -> Any:
    """ "off", or the object: a union would complain about two branches instead of one field."""
    return value if value == OFF else validate(value)


GateOrOff = Annotated[GateRequest, WrapValidator(_off_or)]


def requested_gate(gate: GateRequest | str | None, policy: GatePolicy) -> GatePolicy:
    """The tenant's `policy` as the job wants it."""
    if gate is None:
        return policy
    return gate.applied_to(policy) if isinstance(gate, GateRequest) else replace(policy, enabled=False)
