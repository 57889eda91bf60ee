"""What `POST /v1/fine_tuning/jobs` may say, and the bounds of it. Knows no table and no trainer.

The hyperparameters after OpenAI's three, `preset`, `alias`, `strict`, `evaluation` and `gate` are extensions; the
official client sends them as plain dictionary entries and through `extra_body`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, WrapValidator, model_validator

from adapters.peft_config import WHY_NO_DORA
from service import job
from service.api.evaluation_schemas import EvaluationRequest, GateOrOff
from service.api.wire import WireModel, field_error

MAX_SEED = 2**31 - 1
MAX_METADATA_PAIRS = 16


def _auto_or(value: Any, validate: Callable[[Any], Any]) -> Any:
    """ "auto", or the number: a union would complain about two branches instead of one field."""
    return value if value == "auto" else validate(value)


def _number(value: object) -> bool:
    return isinstance(value, int | float)


def _modules(value: object) -> object:
    return [value] if value in ("auto", "all-linear") else value


def _distinct(value: list[int]) -> list[int]:
    if len(set(value)) < len(value):
        raise ValueError("names a layer twice")
    return value


def _auto_or_probe(value: Any, validate: Callable[[Any], Any]) -> Any:
    return value if value in ("auto", "probe") else validate(value)


_Auto = WrapValidator(_auto_or)
AutoCount = Annotated[int, Field(ge=1, le=MAX_SEED), _Auto]
AutoPositive = Annotated[float, Field(gt=0, le=1e9), _Auto]
LayerIndex = Annotated[int, Field(ge=0, le=MAX_SEED)]
ModuleName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
FileId = Annotated[str, StringConstraints(min_length=1, max_length=128)]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class Hyperparameters(WireModel):
    """Of the method `supervised`."""

    n_epochs: Annotated[int, Field(ge=1, le=50), _Auto] | None = None
    batch_size: Annotated[int, Field(ge=1, le=256), _Auto] | None = None
    learning_rate_multiplier: AutoPositive | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1), WrapValidator(_auto_or_probe)] | None = None
    lora_r: AutoCount | None = None
    lora_alpha: AutoPositive | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1), _Auto] | None = None
    target_modules: (
        Annotated[list[ModuleName], Field(min_length=1, max_length=256), BeforeValidator(_modules)] | None
    ) = None
    layers_to_transform: (
        Annotated[
            list[LayerIndex],
            Field(min_length=1, max_length=512),
            AfterValidator(_distinct),
        ]
        | None
    ) = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    schedule: Literal["auto", "linear", "cosine", "constant"] | None = None
    warmup_ratio: Annotated[float, Field(ge=0, le=0.5), _Auto] | None = None
    weight_decay: Annotated[float, Field(ge=0, le=1), _Auto] | None = None
    activation_checkpointing: Annotated[bool, _Auto] | None = None
    eval_every: AutoCount | None = None
    early_stopping_patience: AutoCount | None = None

    @model_validator(mode="after")
    def _one_learning_rate(self) -> Self:
        if _number(self.learning_rate) and _number(self.learning_rate_multiplier):
            raise field_error("learning_rate_multiplier", "give either this or 'learning_rate', not both")
        return self

    @model_validator(mode="after")
    def _no_dora(self) -> Self:
        if self.use_dora:
            raise field_error("use_dora", WHY_NO_DORA)
        return self

    def requested(self) -> job.Hyperparameters:
        """As the job keeps them. `early_stopping_patience: null` switches early stopping off; null elsewhere asks
        for the default."""
        values = {name: value for name, value in self if value is not None and name != "use_dora"}
        if "early_stopping_patience" in self.model_fields_set:
            values["early_stopping_patience"] = self.early_stopping_patience
        if (modules := values.get("target_modules")) is not None:
            values["target_modules"] = modules[0] if modules in (["auto"], ["all-linear"]) else tuple(modules)
        if (layers := values.get("layers_to_transform")) is not None:
            values["layers_to_transform"] = tuple(sorted(layers))
        return job.Hyperparameters(**values)


class SupervisedHyperparameters(Hyperparameters):
    kl_to_base: Annotated[float, Field(ge=0, le=100), _Auto] | None = None


class DpoHyperparameters(Hyperparameters):
    """`beta` is OpenAI's."""

    beta: Annotated[float, Field(gt=0, le=2), _Auto] | None = None


class Supervised(WireModel):
    hyperparameters: SupervisedHyperparameters | None = None


class Dpo(WireModel):
    hyperparameters: DpoHyperparameters | None = None


class Method(WireModel):
    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {"reinforcement": ()}

    @model_validator(mode="after")
    def _only_its_own(self) -> Self:
        other = "dpo" if self.type == "supervised" else "supervised"
        if getattr(self, other) is not None:
            raise field_error(other, f"the method's type is {self.type!r}: leave this out, or change the type")
        return self

    @property
    def hyperparameters(self) -> Hyperparameters | None:
        given = self.supervised or self.dpo
        return None if given is None else given.hyperparameters


class JobRequest(WireModel):
    """The body of `POST /v1/fine_tuning/jobs`."""

    model: str = Field(min_length=1, max_length=512)
    training_file: FileId
    validation_file: FileId | None = None
    suffix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}\z")] | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    method: Method | None = None
    preset: Literal["light", "standard", "thorough"] | None = None
    hyperparameters: SupervisedHyperparameters | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA_PAIRS)] | None = None
    alias: str | None = None
    strict: bool | None = None
    evaluation: EvaluationRequest | None = None
    gate: GateOrOff | None = None

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {"integrations": ([],)}

    @model_validator(mode="after")
    def _hyperparameters_once(self) -> Self:
        if self.hyperparameters is not None and self.method_hyperparameters is not None:
            raise field_error("hyperparameters", "deprecated, and given under 'method' already")
        return self

    @model_validator(mode="after")
    def _deprecated_place_is_supervised(self) -> Self:
        if self.hyperparameters is not None and self.method_type is job.Method.DPO:
            raise field_error(
                "hyperparameters", "deprecated; those of the method 'dpo' go to method.dpo.hyperparameters"
            )
        return self

    @property
    def method_type(self) -> job.Method:
        return job.Method.SUPERVISED if self.method is None else job.Method(self.method.type)

    @property
    def method_hyperparameters(self) -> Hyperparameters | None:
        return None if self.method is None else self.method.hyperparameters

    @property
    def requested(self) -> job.Hyperparameters:
        given = self.method_hyperparameters or self.hyperparameters or Hyperparameters()
        return given.requested()
