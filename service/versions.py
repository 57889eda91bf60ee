"""Adapter versions as rows: published models and checkpoints, immutable. Knows no alias and no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.errors import NotFoundError
from service.tables import adapter_versions, epoch_now


@dataclass(frozen=True)
class AdapterVersion:
    """A published version, or a checkpoint of its job (`step` says which). `digest` is its content."""

    id: str
    tenant_id: str
    digest: str
    job_id: str | None
    base_model: str
    base_fingerprint: str
    metrics: Mapping[str, Any]
    created_at: float = 0.0
    step: int | None = None
    provenance: Mapping[str, Any] | None = None
    """See `service.provenance`; an imported version has this, and no job."""


def insert_version(connection: Connection, version: AdapterVersion, *, checkpoint_id: str | None = None) -> None:
    """Publish in the caller's transaction; the database sets `created_at`."""
    values = {**version.__dict__, "created_at": epoch_now(), "metrics": dict(version.metrics)}
    connection.execute(adapter_versions.insert().values(**values, checkpoint_id=checkpoint_id))


def find_version(connection: Connection, tenant_id: str, model: str) -> AdapterVersion | None:
    query = sa.select(adapter_versions).where(adapter_versions.c.tenant_id == tenant_id, adapter_versions.c.id == model)
    row = connection.execute(query).one_or_none()
    return None if row is None else version_of(row)


def version_of(row: sa.Row[Any]) -> AdapterVersion:
    return AdapterVersion(
        id=row.id,
        tenant_id=row.tenant_id,
        digest=row.digest,
        job_id=row.job_id,
        base_model=row.base_model,
        base_fingerprint=row.base_fingerprint,
        metrics=row.metrics,
        created_at=row.created_at,
        step=row.step,
        provenance=row.provenance,
    )


def model_not_found(model: str) -> NotFoundError:
    return NotFoundError(f"The model '{model}' does not exist.", param="model", code="model_not_found")
