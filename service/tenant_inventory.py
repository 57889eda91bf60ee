"""Every place where something of a tenant's is, and what becomes of it when the tenant is deleted. Data; does nothing.

A test holds it against the tables, so that nobody adds one and forgets it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Fate(StrEnum):
    """Of a table's rows."""

    GONE = "gone"
    """Deleted with the tenant's row, in one transaction."""
    NUMBERS = "numbers"
    """Counts of tokens by the hour stay, under the tenant's id, for the last bill and the books that a business has to
    keep; names of keys and models do not."""
    RECORD = "record"
    """What the administrator and the tenant's keys did to tenants, keys and limits stays: the proof that it was
    deleted, and when. Ids, the tenant's name; no content, no secret."""
    ANONYMOUS = "anonymous"
    """It names no tenant and is forgotten by itself."""
    TO_DO = "to do"
    """What is still to be removed outside the database: ids, until it is."""


TABLES = {
    "tenants": Fate.GONE,
    "api_keys": Fate.GONE,
    "files": Fate.GONE,
    "jobs": Fate.GONE,
    "job_metadata": Fate.GONE,
    "job_events": Fate.GONE,
    "adapter_versions": Fate.GONE,
    "merges": Fate.GONE,
    "alias_moves": Fate.GONE,
    "aliases": Fate.GONE,
    "experiments": Fate.GONE,
    "experiment_measures": Fate.GONE,
    "completions": Fate.GONE,
    "feedback": Fate.GONE,
    "tenant_settings": Fate.GONE,
    "captures": Fate.GONE,
    "quality_streams": Fate.GONE,
    "quality_blocks": Fate.GONE,
    "retraining_proposals": Fate.GONE,
    "retraining_events": Fate.GONE,
    "gate_policies": Fate.GONE,
    "drift_streams": Fate.GONE,
    "drift_states": Fate.GONE,
    "drift_events": Fate.GONE,
    "tenant_limits": Fate.GONE,
    "usage_hours": Fate.NUMBERS,
    "usage_entries": Fate.ANONYMOUS,
    "audit_log": Fate.RECORD,
    "removals": Fate.TO_DO,
}


@dataclass(frozen=True)
class Place:
    """Outside the tables."""

    what: str
    removed_by: str


PLACES = (
    Place("uploaded and written files: storage, files/{tenant}/", "Files.discard_all"),
    Place("adapters that no other tenant has: storage, adapters/sha256/{digest}/", "AdapterStore.delete"),
    Place("copies of a remote store's adapters: data directory, cache/adapters/", "AdapterStore.delete, each process"),
    Place("training states: storage, training/{job}/", "ResumePoints.discard; by the job's own worker, too"),
    Place("an adapter that a running job published and no row names", "TuningRun, when its job is gone"),
    Place("merged models: data directory, merged/{merge}/", "Merges.discard"),
    Place("free pages and write-ahead log of SQLite", "secure_delete; Database.scrub"),
    Place("a job that is being trained", "its next heartbeat finds no row and it stops, within seconds"),
    Place("running and waiting answers, also those on their way", "ServingEngine.forget_tenant"),
    Place("adapters in device slots and host memory", "ServingEngine.retire"),
    Place("computed beginnings of prompts, also of the base", "ServingEngine.forget_tenant"),
    Place("how much it was served, for fairness", "ServingEngine.forget_tenant"),
    Place("compiled grammars, in both processes", "GrammarCompiler.forget"),
    Place("data reports, which quote training files", "DataReports.forget"),
    Place("drift monitors, their board and gauges", "DriftWatch.forget_deleted"),
    Place("answers waiting for drift's look, calibrations under way", "dropped: their stream has no row any more"),
    Place("completions and captures waiting to be written", "left out: their tenant has no row any more"),
    Place("events waiting for the operator's webhook: ids, no text", "delivered or dropped within minutes"),
    Place("buckets of rate limits", "RateLimits.forget"),
    Place("metric label sets", "Metrics.forget_tenant"),
)
"""Elsewhere, and kept by whoever keeps it: log lines and traces (ids, no text), backups, Prometheus' history, and what
Postgres has not vacuumed yet."""
