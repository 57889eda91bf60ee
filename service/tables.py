"""Every table, and the SQL of the database's own clock. Knows no connection; a change needs a step in
`service.migrations`."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import Boolean, Column, Float, ForeignKey, Index, Integer, String, Table, Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)
"""Every constraint has a name, by which a migration can change it."""


def _tenant_column(**options: Any) -> Column[str]:
    return Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, **options)


tenants = Table(
    "tenants",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("created_at", Float(53), nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    _tenant_column(index=True),
    Column("digest", String(64), nullable=False),
    Column("role", String(16), nullable=False, default="admin"),
    Column("name", String(64)),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53)),
)

files = Table(
    "files",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    _tenant_column(index=True),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", sa.BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("storage_key", Text, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53)),
    sqlite_autoincrement=True,
)

jobs = Table(
    "jobs",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    _tenant_column(),
    Column("spec", sa.JSON, nullable=False),
    Column("training_file", String(64), nullable=False),
    Column("validation_file", String(64)),
    Column("evaluation_file", String(64)),
    Column("parent_digest", String(64)),
    Column("state", String(16), nullable=False),
    Column("files_validated", Boolean, nullable=False, default=False),
    Column("paused", Boolean, nullable=False, default=False),
    Column("attempt", Integer, nullable=False, default=0),
    Column("num_lost_leases", Integer, nullable=False, default=0),
    Column("worker", String(128)),
    Column("lease_renewed_at", Float(53)),
    Column("lease_expires_at", Float(53)),
    Column("created_at", Float(53), nullable=False),
    Column("finished_at", Float(53)),
    Column("estimated_finish", Float(53)),
    Column("trained_tokens", sa.BigInteger),
    Column("booked_tokens", sa.BigInteger, nullable=False, default=0),
    Column("key_id", String(32)),
    Column("resolved", sa.JSON(none_as_null=True)),
    Column("resume_point", Text),
    Column("fine_tuned_model", Text),
    Column("result_files", sa.JSON, nullable=False, default=list),
    Column("error", sa.JSON(none_as_null=True)),
    Column("data_report", sa.JSON(none_as_null=True)),
    Column("estimate", sa.JSON(none_as_null=True)),
    Column("tokens_per_second", Float(53)),
    Column("idempotency_key", Text),
    Column("request_digest", String(64), nullable=False),
    Index("jobs_by_tenant", "tenant_id", "seq"),
    Index("jobs_by_state", "state", "seq"),
    sqlite_autoincrement=True,
)

job_metadata = Table(
    "job_metadata",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(512), nullable=False),
)

job_events = Table(
    "job_events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("level", String(8), nullable=False),
    Column("type", String(8), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", sa.JSON(none_as_null=True)),
    Index("events_by_job", "job_id", "seq"),
    sqlite_autoincrement=True,
)

adapter_versions = Table(
    "adapter_versions",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(512), nullable=False, unique=True),
    _tenant_column(index=True),
    Column("digest", String(64), nullable=False, index=True),
    Column("job_id", ForeignKey("jobs.id", ondelete="SET NULL"), index=True),
    Column("base_model", Text, nullable=False),
    Column("base_fingerprint", Text, nullable=False),
    Column("checkpoint_id", String(64), unique=True),
    Column("step", Integer),
    Column("created_at", Float(53), nullable=False),
    Column("metrics", sa.JSON, nullable=False),
    Column("provenance", sa.JSON(none_as_null=True)),
    sqlite_autoincrement=True,
)
"""Published versions, and checkpoints: those carry `checkpoint_id` and `step`. An imported version has no job.

`provenance` (see `service.provenance`) outlives the job and its files.
"""

merges = Table(
    "merges",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    _tenant_column(index=True),
    Column("model", String(512), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempt", Integer, nullable=False, default=0),
    Column("lease_expires_at", Float(53)),
    Column("bytes", sa.BigInteger, nullable=False),
    Column("report", sa.JSON(none_as_null=True)),
    Column("error", sa.JSON(none_as_null=True)),
    Column("created_at", Float(53), nullable=False),
    Column("finished_at", Float(53)),
    Column("expires_at", Float(53)),
    sqlite_autoincrement=True,
)
"""Merged models; `bytes` is an estimate until one is there."""

alias_moves = Table(
    "alias_moves",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    _tenant_column(),
    Column("alias", String(64), nullable=False),
    Column("model", String(512), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("previous", Integer),
    Column("created_at", Float(53), nullable=False),
    Index("moves_by_alias", "tenant_id", "alias", "seq"),
    sqlite_autoincrement=True,
)
"""Append-only; `previous` is the move that a rollback of this one returns to."""

aliases = Table(
    "aliases",
    metadata,
    _tenant_column(primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("move", ForeignKey("alias_moves.seq"), nullable=False),
)
"""The active pointer of each alias."""

experiments = Table(
    "experiments",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    _tenant_column(),
    Column("alias", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("stable_model", String(512), nullable=False),
    Column("stable_digest", String(64), nullable=False),
    Column("model", String(512), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("percent", Float(53), nullable=False),
    Column("policy", sa.JSON, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("outcome", String(16)),
    Column("reason", Text),
    Column("ended_at", Float(53)),
    Index("experiments_by_alias", "tenant_id", "alias", "seq"),
    Index(
        "one_running_experiment",
        *("tenant_id", "alias", "kind"),
        unique=True,
        sqlite_where=sa.text("outcome IS NULL"),
        postgresql_where=sa.text("outcome IS NULL"),
    ),
    sqlite_autoincrement=True,
)
"""Canaries and shadows of aliases; those without an `outcome` are running."""

experiment_measures = Table(
    "experiment_measures",
    metadata,
    Column("experiment_id", ForeignKey("experiments.id", ondelete="CASCADE"), primary_key=True),
    Column("arm", String(16), primary_key=True),
    Column("name", String(32), primary_key=True),
    Column("count", sa.BigInteger, nullable=False, default=0),
    Column("total", Float(53), nullable=False, default=0.0),
    Column("squares", Float(53), nullable=False, default=0.0),
)
"""What each arm of an experiment has shown so far: for every measure its count, sum and sum of squares."""

completions = Table(
    "completions",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    _tenant_column(index=True),
    Column("model", String(512), nullable=False),
    Column("digest", String(64)),
    Column("alias", String(64)),
    Column("experiment_id", String(64)),
    Column("arm", String(16)),
    Column("unit", String(32)),
    Column("answer_digest", String(8)),
    Column("created_at", Float(53), nullable=False, index=True),
    sqlite_autoincrement=True,
)
"""Which model gave which answer: what feedback refers to. No text; dropped after the time of retention.

`answer_digest`: see `service.answer_digest`; None where there is not one whole answer.
"""

feedback = Table(
    "feedback",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    _tenant_column(),
    Column("completion_id", String(64), nullable=False),
    Column("user_digest", String(64), nullable=False),
    Column("rating", Float(53)),
    Column("label", String(128)),
    Column("corrected", Text),
    Column("model", String(512), nullable=False),
    Column("digest", String(64)),
    Column("alias", String(64)),
    Column("experiment_id", String(64)),
    Column("arm", String(16)),
    Column("unit", String(32)),
    Column("represents_unit", Boolean, nullable=False),
    Column("correct", Float(53)),
    Column("accuracy_block", Integer),
    Column("rating_block", Integer),
    Column("created_at", Float(53), nullable=False, index=True),
    Column("updated_at", Float(53), nullable=False),
    sa.UniqueConstraint("tenant_id", "completion_id", "user_digest"),
    Index("feedback_by_unit", "experiment_id", "unit"),
    Index("feedback_by_digest", "tenant_id", "digest", "created_at"),
    sqlite_autoincrement=True,
)
"""`represents_unit`: the one rating of its end user that counts in the comparison of a canary. `correct` is 1 or 0;
the blocks are those of `quality_blocks` in which this entry counts."""

tenant_settings = Table(
    "tenant_settings",
    metadata,
    _tenant_column(primary_key=True),
    Column("capture", Boolean, nullable=False, default=False),
    Column("capture_days", Integer, nullable=False),
    Column("retraining", String(16), nullable=False),
)
"""What a tenant has chosen; without a row, the defaults."""

captures = Table(
    "captures",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    _tenant_column(),
    Column("user_digest", String(64), nullable=False),
    Column("model", String(512), nullable=False),
    Column("prompt", sa.JSON, nullable=False),
    Column("answer", Text, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Index("captures_by_tenant", "tenant_id", "seq"),
    sqlite_autoincrement=True,
)
"""Prompts and answers of tenants that consented, by the completion's id. The only table with text of requests, beside
`feedback.corrected`."""

quality_streams = Table(
    "quality_streams",
    metadata,
    _tenant_column(primary_key=True),
    Column("model", String(512), primary_key=True),
    Column("digest", String(64)),
    Column("created_at", Float(53), nullable=False),
    Column("fell_at", Float(53)),
    Column("reason", Text),
    Column("told_at", Float(53)),
)
"""Every version that somebody judged; `told_at`: retraining has heard that its quality fell."""

quality_blocks = Table(
    "quality_blocks",
    metadata,
    _tenant_column(primary_key=True),
    Column("model", String(512), primary_key=True),
    Column("measure", String(16), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("count", Integer, nullable=False),
    Column("total", Float(53), nullable=False),
    Column("updated_at", Float(53), nullable=False, index=True),
)
"""Judged answers in the order of their first judgement, summed up in blocks; the first ones are the baseline."""

_OPEN_RETRAINING = sa.text("state IN ('collecting', 'insufficient', 'checking', 'proposed')")

retraining_proposals = Table(
    "retraining_proposals",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    _tenant_column(),
    Column("target", String(512), nullable=False),
    Column("model", String(512), nullable=False),
    Column("digest", String(64)),
    Column("alias", String(64)),
    Column("trigger", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("options", sa.JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("revision", Integer, nullable=False, default=0),
    Column("attempts", Integer, nullable=False, default=0),
    Column("seed", Integer, nullable=False),
    Column("missing", Text),
    Column("counts", sa.JSON(none_as_null=True)),
    Column("training_file", String(64)),
    Column("validation_file", String(64)),
    Column("original_job", String(64)),
    Column("report", sa.JSON(none_as_null=True)),
    Column("estimate", sa.JSON(none_as_null=True)),
    Column("error", sa.JSON(none_as_null=True)),
    Column("job_id", String(64), index=True),
    Column("created_at", Float(53), nullable=False),
    Column("collected_at", Float(53)),
    Column("texts_until", Float(53)),
    Column("erased", Boolean, nullable=False, default=False),
    Column("started_at", Float(53)),
    Column("ended_at", Float(53)),
    Index("retraining_by_tenant", "tenant_id", "seq"),
    Index("retraining_by_state", "state"),
    Index(
        "one_open_retraining",
        *("tenant_id", "target"),
        unique=True,
        sqlite_where=_OPEN_RETRAINING,
        postgresql_where=_OPEN_RETRAINING,
    ),
    sqlite_autoincrement=True,
)
"""`target` is the alias that a job would follow, or else the model. Every write is fenced by `revision`; `model` and
`digest` are what a job would go on from, `original_job` whose files are taken along. `texts_until`: when the first of
the captures in its files would have gone by itself; `erased`: no text of captures is left in what was made of them."""

retraining_events = Table(
    "retraining_events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("proposal_id", ForeignKey("retraining_proposals.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("created_at", Float(53), nullable=False),
    Column("message", Text, nullable=False),
    sqlite_autoincrement=True,
)


gate_policies = Table(
    "gate_policies",
    metadata,
    _tenant_column(primary_key=True),
    Column("policy", sa.JSON, nullable=False),
    Column("updated_at", Float(53), nullable=False),
)
"""What each tenant's candidates must show; a tenant without a row has the default policy."""

drift_streams = Table(
    "drift_streams",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    _tenant_column(),
    Column("digest", String(64), nullable=False),
    Column("model", String(512), nullable=False),
    Column("basis", String(128), nullable=False),
    Column("reference_basis", String(128)),
    Column("salt", sa.LargeBinary, nullable=False),
    Column("sampling", sa.LargeBinary),
    Column("input_state", sa.LargeBinary),
    Column("output_state", sa.LargeBinary),
    Column("samples", sa.BigInteger, nullable=False, default=0),
    Column("created_at", Float(53), nullable=False),
    Column("seen_at", Float(53), nullable=False, index=True),
    sa.UniqueConstraint("tenant_id", "digest"),
    sqlite_autoincrement=True,
)
"""One adapter's traffic as its monitors stand: numbers and salted hashes, no text.

`basis` is the base's when it last ran, `reference_basis` that of the adapter's reference, if it has one.
"""

drift_states = Table(
    "drift_states",
    metadata,
    Column("stream", ForeignKey("drift_streams.seq", ondelete="CASCADE"), primary_key=True),
    Column("signal", String(32), primary_key=True),
    Column("state", String(24), nullable=False),
    Column("statistic", Float(53)),
    Column("threshold", Float(53)),
    Column("samples", sa.BigInteger, nullable=False),
    Column("since", Float(53), nullable=False),
    Column("num_calm", Integer, nullable=False),
    Column("acknowledged_at", Float(53)),
    Column("acknowledged_by", String(32)),
    Column("acknowledged_note", Text),
)

drift_events = Table(
    "drift_events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    _tenant_column(),
    Column("model", String(512), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("signal", String(32), nullable=False),
    Column("state", String(24), nullable=False),
    Column("previous", String(24), nullable=False),
    Column("statistic", Float(53)),
    Column("threshold", Float(53)),
    Column("samples", sa.BigInteger, nullable=False),
    Column("at", Float(53), nullable=False),
    Column("by", String(32)),
    Column("note", Text),
    Index("drift_events_by_tenant", "tenant_id", "seq"),
    Index("drift_events_by_digest", "tenant_id", "digest", "seq"),
    sqlite_autoincrement=True,
)
"""Append-only; `by` is of an acknowledgement."""

usage_hours = Table(
    "usage_hours",
    metadata,
    Column("tenant_id", String(64), primary_key=True),
    Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
    Column("key_id", String(32), primary_key=True),
    Column("model", String(512), primary_key=True),
    Column("requests", sa.BigInteger, nullable=False),
    Column("prompt_tokens", sa.BigInteger, nullable=False),
    Column("completion_tokens", sa.BigInteger, nullable=False),
    Column("cached_tokens", sa.BigInteger, nullable=False),
    Column("training_tokens", sa.BigInteger, nullable=False),
    Index("usage_by_hour", "hour"),
)
"""The books: what each tenant used, by key and model, in the hour (UTC) that began at `hour`, unix seconds.

No foreign key: the numbers of a deleted tenant stay, for the last bill, without its keys' and models' names
(`service.usage_rows`). An empty `key_id`: nobody's key, such as a retraining that started by itself.
"""

usage_entries = Table(
    "usage_entries",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("booked_at", Float(53), nullable=False, index=True),
)
"""Which completions are in the books, for as long as one might be booked again."""

tenant_limits = Table(
    "tenant_limits",
    metadata,
    _tenant_column(primary_key=True),
    Column("requests_per_minute", sa.BigInteger),
    Column("tokens_per_minute", sa.BigInteger),
    Column("max_files", sa.BigInteger),
    Column("max_bytes", sa.BigInteger),
    Column("max_jobs", sa.BigInteger),
    Column("max_adapters", sa.BigInteger),
)
"""What the administrator lets a tenant have; null: as much as it likes."""

audit_log = Table(
    "audit_log",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("at", Float(53), nullable=False),
    Column("actor", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("tenant_id", String(64), index=True),
    Column("details", sa.JSON, nullable=False),
    sqlite_autoincrement=True,
)
"""Append-only: who changed tenants, keys and limits. No foreign key: it outlives the tenant. No secrets."""

removals = Table(
    "removals",
    metadata,
    Column("tenant_id", String(64), primary_key=True),
    Column("left_behind", sa.JSON, nullable=False),
    Column("removed_at", Float(53), nullable=False),
)
"""Deleted tenants whose things outside the database are not removed yet (`service.tenant_removal`). Ids, no names."""


class epoch_now(FunctionElement[float]):
    """Unix seconds by the database's clock, read when the statement runs (not when its transaction began)."""

    type = Float(53)
    inherit_cache = True


@compiles(epoch_now, "sqlite")
def _epoch_now_sqlite(element: Any, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(epoch_now, "postgresql")
def _epoch_now_postgresql(element: Any, compiler: Any, **options: Any) -> str:
    return "CAST(extract(epoch from clock_timestamp()) AS double precision)"
