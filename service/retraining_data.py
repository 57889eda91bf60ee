"""What a retraining learns from: consented exchanges with corrections, and the parent's own examples. Two JSONL files.

Fresh examples are captured prompts with the corrected answer, or with an answer that was rated well. One for each
prompt: a correction before a rating, the newest before older ones; an original example with the same input gives way.
A fifth of the fresh ones, chosen by a hash of the input and so the same ones every time, is held out together with
rows that the parent did not learn from: no contestant of the evaluation has seen them. Knows no proposal's state.
"""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from heapq import nsmallest
from itertools import chain
from typing import Any, BinaryIO

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.corpus import Codec
from adapters.dataset import MIN_EXAMPLES
from adapters.example import ChatExample, Example, parse_example
from service.captures import DAY, days_of, too_old
from service.errors import NotFoundError
from service.estimates import AskedJob
from service.files import FilePurpose, Files, StagedFile
from service.job import EvaluationSpec, JobSpec
from service.retraining_rows import RetrainingOptions
from service.tables import captures, feedback
from service.tuning_data import BREATH_SECONDS, JobFiles

HELD_OUT_EVERY = 5
OLD_PER_FRESH = 3
MIN_HELD_OUT = 40
"""Rows of the parent's are added up to three for each fresh one, or up to this many together."""


@dataclass(frozen=True)
class Fresh:
    """`key` stands for its input; `is_new`: corrected since the parent's own data were collected."""

    key: str
    raw: bytes
    is_corrected: bool
    is_new: bool

    @property
    def is_held_out(self) -> bool:
        return int(sha256(self.key.encode("utf-8", "replace")).hexdigest(), 16) % HELD_OUT_EVERY == 0


@dataclass(frozen=True)
class Counts:
    """What went into the files, and what did not."""

    corrected: int = 0
    new_corrected: int = 0
    rated: int = 0
    repeated: int = 0
    unusable: int = 0
    original: int = 0
    replaced: int = 0
    held_out: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Material:
    """The fresh examples; `texts_until`: when the first of their captures goes by itself."""

    fresh: tuple[Fresh, ...] = ()
    repeated: int = 0
    unusable: int = 0
    texts_until: float | None = None

    @property
    def counts(self) -> Counts:
        corrected = [one for one in self.fresh if one.is_corrected]
        return Counts(
            corrected=len(corrected),
            new_corrected=sum(one.is_new for one in corrected),
            rated=len(self.fresh) - len(corrected),
            repeated=self.repeated,
            unusable=self.unusable,
        )

    def split(self) -> tuple[list[Fresh], list[Fresh]]:
        """To learn from, and held out; neither is empty where there are two or more."""
        held_out = [one for one in self.fresh if one.is_held_out] or list(self.fresh[:1])
        if len(held_out) == len(self.fresh):
            held_out = held_out[: len(held_out) // 2]
        keys = {one.key for one in held_out}
        return [one for one in self.fresh if one.key not in keys], held_out


@dataclass(frozen=True)
class Original:
    """The job whose files the first parent learned from."""

    job_id: str
    spec: JobSpec


@dataclass(frozen=True)
class BuiltFiles:
    training: StagedFile
    validation: StagedFile
    counts: Counts


def gather(
    connection: Connection,
    tenant_id: str,
    *,
    models: Collection[str],
    alias: str | None,
    since: float,
    options: RetrainingOptions,
) -> Material:
    """What was said of captured answers of these models, or under the alias. `since`: corrections after it are new."""
    rows = connection.execute(_commented(tenant_id, models, alias)).all()
    best: dict[str, tuple[bool, Fresh]] = {}
    repeated = unusable = 0
    until: float | None = None
    corrected_completions = {row.id for row in rows if row.corrected is not None}
    for row in rows:
        answer = row.corrected
        if answer is None and row.id not in corrected_completions and _is_good(row, options.min_rating):
            answer = row.answer
        if answer is None:
            continue
        line = _line(row.prompt, answer)
        key = _usable_key(line)
        if key is None:
            unusable += 1
            continue
        is_corrected = row.corrected is not None
        before = best.get(key)
        repeated += before is not None
        until = row.expires_at if until is None else min(until, row.expires_at)
        if before is None or is_corrected or not before[0]:
            best[key] = (is_corrected, Fresh(key, line, is_corrected, is_corrected and row.updated_at > since))
    return Material(tuple(fresh for _, fresh in best.values()), repeated, unusable, until)


def count_corrected(
    connection: Connection, tenant_id: str, *, models: Collection[str], alias: str | None, since: float
) -> int:
    """At most as many as `gather` would find to be new; cheap."""
    query = _commented(tenant_id, models, alias).where(feedback.c.corrected.is_not(None), feedback.c.updated_at > since)
    prompts = query.with_only_columns(captures.c.id).order_by(None).distinct().subquery()
    return int(connection.execute(sa.select(sa.func.count()).select_from(prompts)).scalar_one())


class RetrainingFiles:
    """Writes the two files. Takes as long as tokenizing the original's takes: `check` is called often and may raise."""

    def __init__(self, files: Files, codec: Codec, max_length: int) -> None:
        self._files = files
        self._codec = codec
        self._max_length = max_length

    def build(
        self, tenant_id: str, name: str, material: Material, original: Original | None, check: Callable[[], None]
    ) -> BuiltFiles:
        """Durable, and seen by nobody yet. Raises NotFoundError when the original's files are gone, DatasetError when
        they cannot be read."""
        train, held_out = material.split()
        old = None if original is None else self._old_rows(tenant_id, original, material, check)
        num_old = max(OLD_PER_FRESH * len(held_out), MIN_HELD_OUT - len(held_out))
        of_old = [] if old is None else nsmallest(num_old, old.held_out(), key=lambda raw: sha256(raw).digest())
        validation = self._stage(tenant_id, f"{name}-validation.jsonl", [*(one.raw for one in held_out), *of_old])
        rows = chain(() if old is None else old.learned(), (one.raw for one in train))
        training = self._stage(tenant_id, f"{name}-train.jsonl", rows)
        counts = replace(material.counts, held_out=len(held_out) + len(of_old))
        if old is not None:
            counts = replace(counts, original=old.num_learned, replaced=old.num_replaced)
        return BuiltFiles(training, validation, counts)

    def discard(self, built: BuiltFiles) -> None:
        self._files.discard([built.training.storage_key, built.validation.storage_key])

    def has(self, tenant_id: str, spec: JobSpec) -> bool:
        """Whether the files that such a job learned from are still there."""
        try:
            for file_id in (spec.training_file, spec.validation_file):
                if file_id is not None:
                    self._files.get(tenant_id, file_id)
        except NotFoundError:
            return False
        return True

    def _stage(self, tenant_id: str, name: str, rows: Iterable[bytes]) -> StagedFile:
        return self._files.stage(tenant_id, name, FilePurpose.FINE_TUNE, (row + b"\n" for row in rows))

    def _old_rows(self, tenant_id: str, original: Original, material: Material, check: Callable[[], None]) -> _OldRows:
        spec = replace(original.spec, evaluation=EvaluationSpec())
        held_out: frozenset[int] = frozenset()
        if spec.validation_file is None:
            job = JobFiles(self._files, AskedJob(tenant_id, spec), self._codec, self._max_length, check)
            held_out = frozenset(job.load().valid.lines.tolist())
        return _OldRows(
            partial(self._files.open, tenant_id), spec, held_out, {one.key for one in material.fresh}, check
        )


class _OldRows:
    """The original's examples whose inputs no fresh one has, one at a time. `held_out_lines` are those of its split."""

    def __init__(
        self,
        open_file: Callable[[str], BinaryIO],
        spec: JobSpec,
        held_out_lines: Collection[int],
        taken: Collection[str],
        check: Callable[[], None],
    ) -> None:
        self._open = open_file
        self._spec = spec
        self._held_out_lines = held_out_lines
        self._taken = taken
        self._check = check
        self.num_learned = 0
        self.num_replaced = 0

    def learned(self) -> Iterator[bytes]:
        for number, row, key in self._rows(self._spec.training_file):
            if number in self._held_out_lines:
                continue
            if key in self._taken:
                self.num_replaced += 1
                continue
            self.num_learned += 1
            yield row

    def held_out(self) -> Iterator[bytes]:
        separate = self._spec.validation_file
        for number, row, key in self._rows(separate or self._spec.training_file):
            if key not in self._taken and (separate is not None or number in self._held_out_lines):
                yield row

    def _rows(self, file_id: str) -> Iterator[tuple[int, bytes, str]]:
        with self._open(file_id) as stream:
            for number, raw in enumerate(stream, start=1):
                self._check()
                time.sleep(BREATH_SECONDS)
                row = raw.removeprefix(codecs.BOM_UTF8).strip()
                if row:
                    yield number, row, _key_of(parse_example(number, row))


def enough(material: Material) -> bool:
    return material.counts.new_corrected >= MIN_EXAMPLES


def _commented(tenant_id: str, models: Collection[str], alias: str | None) -> sa.Select[Any]:
    """Captured exchanges with what was said of them, oldest word first."""
    c = feedback.c
    theirs: sa.ColumnElement[bool] = c.model.in_(models)
    if alias is not None:
        theirs = sa.or_(theirs, c.alias == alias)
    expires_at = (captures.c.created_at + days_of(captures.c.tenant_id) * DAY).label("expires_at")
    columns = (captures.c.id, captures.c.prompt, captures.c.answer, expires_at)
    same = sa.and_(c.completion_id == captures.c.id, c.tenant_id == captures.c.tenant_id)
    return (
        sa.select(*columns, c.corrected, c.rating, c.correct, c.updated_at)
        .select_from(captures.join(feedback, same))
        .where(captures.c.tenant_id == tenant_id, theirs, sa.not_(too_old(tenant_id)))
        .order_by(c.updated_at, c.seq)
    )


def _is_good(row: sa.Row[Any], min_rating: float | None) -> bool:
    return min_rating is not None and row.rating is not None and row.rating >= min_rating and row.correct != 0.0


def _line(prompt: Mapping[str, Any], answer: str) -> bytes:
    """A line of training data: only the last answer is learned."""
    if "messages" in prompt:
        earlier = [_not_learned(message) for message in prompt["messages"]]
        value: dict[str, Any] = {"messages": [*earlier, {"role": "assistant", "content": answer}]}
    else:
        value = {"prompt": prompt["prompt"], "completion": answer}
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def _not_learned(message: Mapping[str, str]) -> dict[str, Any]:
    return {**message, "weight": 0} if message["role"] == "assistant" else dict(message)


def _usable_key(line: bytes) -> str | None:
    """None: nothing can be learned from it (an empty message, an answer first, …)."""
    try:
        return _key_of(parse_example(1, line))
    except ValueError:
        return None


def _key_of(example: Example) -> str:
    if isinstance(example, ChatExample):
        return json.dumps([[message.role, message.content] for message in example.prompt])
    return json.dumps(example.prompt)
