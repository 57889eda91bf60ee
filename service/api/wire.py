"""What every request model is: strict, and clear about what it does not know. Knows no endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

Unsupported = Mapping[str, tuple[object, ...]]

UNSUPPORTED = "unsupported"
"""pydantic's `type` of the complaint about a field that is missing here."""


class WireModel(BaseModel):
    """Strict: no coercion, no unknown field, no NaN. Names what it does not support yet."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    unsupported: ClassVar[Unsupported] = {}
    """OpenAI's fields that are missing here, each with the values that ask for nothing; null always does."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        for name in cls.unsupported.keys() & body.keys():
            value = body[name]
            if value is not None and not any(_same(value, harmless) for harmless in cls.unsupported[name]):
                raise PydanticCustomError(UNSUPPORTED, "not supported yet", {"param": name})
        return {name: value for name, value in body.items() if name not in cls.unsupported}


def field_error(param: str, reason: str) -> PydanticCustomError:
    """A complaint of a model validator that names the field to blame."""
    return PydanticCustomError("field", "{reason}", {"reason": reason, "param": param})


def field_path(location: Sequence[int | str]) -> str:
    """("messages", 0, "role") -> "messages[0].role"."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _same(value: object, harmless: object) -> bool:
    return value == harmless and type(value) is type(harmless)  # 0 is not False
