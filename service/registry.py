"""Model ids: the base, adapter versions, checkpoints, aliases. Knows no HTTP and no tensors.

A version is immutable (id, digest, base fingerprint). An alias is a pointer with history: setting, publishing and
rolling back are the same move, one appended row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from service.database import Database


@dataclass(frozen=True)
class BaseIdentity:
    """The base that is loaded: the id clients use, and what its weights are."""

    name: str
    fingerprint: str
    created_at: float = 0.0


@dataclass(frozen=True)
class ResolvedModel:
    """What a request's `model` means. `digest` is None for the base itself."""

    id: str
    digest: str | None

    @property
    def is_base(self) -> bool:
        return self.digest is None


@dataclass(frozen=True)
class AdapterVersion:
    id: str
    tenant_id: str
    digest: str
    job_id: str
    base_model: str
    base_fingerprint: str
    created_at: float
    metrics: Mapping[str, Any]


class MoveKind(StrEnum):
    SET = "set"
    PUBLISHED = "published"
    ROLLBACK = "rollback"


@dataclass(frozen=True)
class AliasMove:
    model: str
    kind: MoveKind
    created_at: float


@dataclass(frozen=True)
class Alias:
    name: str
    model: str
    digest: str
    updated_at: float
    history: tuple[AliasMove, ...]
    """Newest first; the first one is the active pointer."""


class Registry:
    def __init__(self, database: Database, base: BaseIdentity) -> None:
        raise NotImplementedError

    def resolve(self, tenant_id: str, model: str) -> ResolvedModel:
        """Base id, version id, checkpoint id or alias. Raises ModelNotFoundError (404), or BaseMismatchError
        when the adapter was trained on another base than the loaded one."""
        raise NotImplementedError

    def versions(self, tenant_id: str) -> list[AdapterVersion]:
        """Newest first; checkpoints are not listed."""
        raise NotImplementedError

    def version(self, tenant_id: str, model: str) -> AdapterVersion:
        """Of a version id, a checkpoint id or an alias."""
        raise NotImplementedError

    def delete_model(self, tenant_id: str, model: str) -> str | None:
        """The digest that nobody refers to any more, for the caller to retire; None when somebody still does.

        Refused (400) while an alias points at the model or an unfinished job starts from it."""
        raise NotImplementedError

    def aliases(self, tenant_id: str) -> list[Alias]:
        raise NotImplementedError

    def alias(self, tenant_id: str, name: str) -> Alias:
        raise NotImplementedError

    def set_alias(self, tenant_id: str, name: str, model: str) -> Alias:
        raise NotImplementedError

    def delete_alias(self, tenant_id: str, name: str) -> None:
        raise NotImplementedError

    def roll_back(self, tenant_id: str, name: str) -> Alias:
        """Back to what the alias pointed at before (skipping models deleted since); a second call goes further."""
        raise NotImplementedError
