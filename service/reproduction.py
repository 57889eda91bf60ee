"""Trains a published adapter again from what is kept with it, and compares. Knows no HTTP and no command line.

The job's own code runs on a database and a store of its own, in a directory that is thrown away: nothing is written
where the service keeps its things, so the service may run meanwhile.

What is compared is what was learned: the SHA-256 of the config and of the weights, which the adapter's digest vouches
for (it is that of the list of the files' SHA-256). On one machine's CPU they are the same. A drift reference is not
made again: it says how prompts look to the base, and takes an engine. An adapter without one has the same digest, too.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import sqlalchemy as sa
import torch

from adapters.errors import AdapterNotFoundError
from adapters.manifest import REQUIRED_FILES
from adapters.store import AdapterStore
from service.database import Database, connect
from service.engine.base_model import BaseModel
from service.engine.errors import EngineDeadError
from service.engine.sequence import GenerationRequest, OutputChunk
from service.errors import NotFoundError, ServiceError
from service.files import FilePurpose, Files, insert_file
from service.job import JobSpec
from service.job_queue import JobQueue
from service.jobs import Idempotency, Jobs
from service.provenance import FORMAT
from service.resume_points import ResumePoints
from service.run_facts import compute_facts, software_facts
from service.tables import adapter_versions
from service.tenants import Tenants
from service.tuning import TuningRun, TuningServices
from service.versions import AdapterVersion, version_of

_CHUNK = 1024 * 1024


class ReproductionError(ServiceError):
    """It cannot even be tried; the message says what is missing."""


@dataclass(frozen=True)
class Reproduction:
    """How it went. `digest` is what the new run published; `differences` what was not as it was then.

    `same`: what was learned is, byte for byte; `learned` is its files' SHA-256. `digest` is another than `expected`
    even then where the adapter has a drift reference besides.
    """

    expected: str
    digest: str | None
    same: bool
    differences: tuple[str, ...]
    learned: Mapping[str, str] = field(default_factory=dict)


def find_version_anywhere(database: Database, model: str) -> AdapterVersion:
    """Of whichever tenant: an operator asks. Raises ReproductionError when it cannot be trained again."""
    with database.read() as connection:
        row = connection.execute(sa.select(adapter_versions).where(adapter_versions.c.id == model)).one_or_none()
    if row is None:
        raise ReproductionError(f"there is no model '{model}' in this database (give its full id, not an alias)")
    version = version_of(row)
    note = version.provenance or {}
    if note.get("origin") == "import":
        raise ReproductionError(f"'{model}' was imported: how it was trained is not known here")
    if note.get("format") != FORMAT:
        raise ReproductionError(f"'{model}' was published by a version that kept too little to train it again")
    return version


class Reproducer:
    """`files` and `store` are the service's own, only read; `given` are copies of files that it no longer has, by
    "training_file" or "validation_file"."""

    def __init__(
        self,
        version: AdapterVersion,
        files: Files,
        store: AdapterStore,
        *,
        given: Mapping[str, Path] | None = None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        assert version.provenance is not None
        self._version = version
        self._note = version.provenance
        self._files = files
        self._store = store
        self._given = given or {}
        self._say = say

    @property
    def base(self) -> Mapping[str, Any]:
        """Which base it needs: name, fingerprint, quantization, max_model_len."""
        base: Mapping[str, Any] = self._note["base"]
        return base

    def check(self) -> None:
        """Before the base is loaded. Raises ReproductionError naming a file or a parent that is gone or changed."""
        for role, noted in self._noted_files():
            with self._open(role, noted) as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
            if found != noted["sha256"]:
                raise ReproductionError(
                    f"the {role.replace('_', ' ')} {noted['id']} ({noted['filename']}) is not the one that was trained"
                    f" on: its sha256 is {found}, then it was {noted['sha256']}"
                )
        parent = self._spec.parent_digest
        if parent is not None and not self._store.exists(parent):
            raise ReproductionError(f"the adapter that it continues, {parent}, was deleted")

    def run(self, base: BaseModel) -> Reproduction:
        """Train. Raises ReproductionError when the base is another one or the run fails."""
        if base.fingerprint != self.base["fingerprint"]:
            raise ReproductionError(
                f"the base {base.name} has the fingerprint {base.fingerprint}; the adapter was trained on"
                f" {self.base['name']} with {self.base['fingerprint']}"
            )
        threads = torch.get_num_threads()
        torch.set_num_threads(self._note["compute"]["num_threads"])
        try:
            differences = _differences(self._note, base)
            for difference in differences:
                self._say(f"differs: {difference}")
            with tempfile.TemporaryDirectory(prefix="rootstock-reproduce-") as directory:
                return self._run_in(Path(directory), base, differences)
        finally:
            torch.set_num_threads(threads)

    def _run_in(self, directory: Path, base: BaseModel, differences: list[str]) -> Reproduction:
        store = AdapterStore(str(directory / "adapters"), directory / "cache")
        self._copy_parent(directory, store)
        parents = set(store.digests())
        with closing(connect(f"sqlite:///{directory / 'rootstock.db'}")) as database:
            files, queue = Files(database, str(directory / "files")), JobQueue(database, lease_seconds=3600.0)
            tenant, _ = Tenants(database).create("reproduction")
            self._copy_files(database, files, tenant.id)
            job = Jobs(database).create(tenant.id, replace(self._spec, alias=None), Idempotency("", retry=False))
            claim = queue.claim("reproduction")
            assert claim is not None
            services = TuningServices(
                queue=queue,
                files=files,
                store=store,
                resume_points=ResumePoints(str(directory)),
                base=base,
                engine=NoEngine(),
                observer=_Progress(self._say),
                max_lora_rank=1024,
                save_every_seconds=float("inf"),
            )
            TuningRun(services, claim, lambda: None).execute()
            job = Jobs(database).get(tenant.id, job.id)
            made = set(store.digests()) - parents  # published before it was evaluated, checkpoints included
            if not made:
                raise ReproductionError(f"training failed: {job.error.message if job.error else job.state}")
            digest = _digest_of(database, job.fine_tuned_model)
            differences += _resolved_differences(self._note["resolved"], job.resolved)
            found = self._same_among(made, store)
            learned = {} if found is None else _learned(store, found)
        return Reproduction(self._version.digest, found or digest, found is not None, tuple(differences), learned)

    def _same_among(self, made: set[str], store: AdapterStore) -> str | None:
        """The adapter that is the expected one, or that learned the same; the store may have lost the expected one."""
        expected = self._version.digest
        if expected in made:
            return expected
        learned = _learned(self._store, expected)
        return next((digest for digest in sorted(made) if learned and _learned(store, digest) == learned), None)

    @property
    def _spec(self) -> JobSpec:
        return JobSpec.from_dict(self._note["job"]["spec"])

    def _noted_files(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for role in ("training_file", "validation_file"):
            noted = self._note["data"][role]
            if noted is not None:
                yield role, noted

    def _open(self, role: str, noted: Mapping[str, Any]) -> BinaryIO:
        if role in self._given:
            return self._given[role].open("rb")
        try:
            return self._files.open(self._version.tenant_id, noted["id"])
        except (NotFoundError, FileNotFoundError):
            raise ReproductionError(
                f"the {role.replace('_', ' ')} {noted['id']} ({noted['filename']}, sha256 {noted['sha256']}) was"
                f" deleted; if you have a copy, name it with --{role.replace('_', '-')}"
            ) from None

    def _copy_files(self, database: Database, files: Files, tenant_id: str) -> None:
        """Under the ids that the job's spec names."""
        for role, noted in self._noted_files():
            with self._open(role, noted) as stream:
                chunks = iter(lambda stream=stream: stream.read(_CHUNK), b"")  # type: ignore[misc]
                staged = files.stage(tenant_id, noted["filename"], FilePurpose.FINE_TUNE, chunks)
            with database.begin() as connection:
                insert_file(connection, replace(staged, id=noted["id"]))

    def _copy_parent(self, directory: Path, store: AdapterStore) -> None:
        if self._spec.parent_digest is None:
            return
        copy = directory / "parent"
        copy.mkdir()
        for name, content in self._store.read(self._spec.parent_digest).items():
            (copy / name).write_bytes(content)
        store.publish(copy)


class NoEngine:
    """Nothing is evaluated: the weights are what is compared."""

    def submit(self, request: GenerationRequest, on_chunk: Callable[[OutputChunk], None]) -> None:
        raise EngineDeadError("a reproduction evaluates nothing")

    def abort(self, request_id: str) -> None: ...


class _Progress:
    """Tells of every tenth step or so; the numbers themselves are not compared."""

    def __init__(self, say: Callable[[str], None], every: int = 10) -> None:
        self._say, self._every, self._num_steps = say, every, 0

    def job_run_finished(self, outcome: str, seconds: float) -> None: ...

    def tokens_trained(self, num_tokens: int) -> None:
        self._num_steps += 1
        if self._num_steps % self._every == 0:
            self._say(f"{self._num_steps} steps")


def _differences(note: Mapping[str, Any], base: BaseModel) -> list[str]:
    """What may round differently: libraries, processor, how the base is held."""
    now = {"software": software_facts(), "compute": compute_facts(base.device)}
    told = [
        f"{name} was {value}, is {now[group].get(name)}"
        for group in ("software", "compute")
        for name, value in note[group].items()
        if now[group].get(name) != value
    ]
    held = {"name": base.name, "quantization": base.quantization.value, "max_model_len": base.max_model_len}
    return told + [
        f"the base's {n} was {note['base'][n]}, is {value}" for n, value in held.items() if note["base"][n] != value
    ]


def _resolved_differences(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[str]:
    """This version of the program may fill "auto" otherwise."""
    then, now = then or {}, now or {}
    return [
        f"{name} was {then.get(name)}, is {now.get(name)}"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]


def _learned(store: AdapterStore, digest: str) -> dict[str, str]:
    """SHA-256 of the files that training made, by name; empty for an adapter that the store no longer has."""
    try:
        files = store.manifest(digest)
    except AdapterNotFoundError:
        return {}
    return {name: files[name]["sha256"] for name in sorted(REQUIRED_FILES)}


def _digest_of(database: Database, model: str | None) -> str | None:
    query = sa.select(adapter_versions.c.digest).where(adapter_versions.c.id == model)
    with database.read() as connection:
        digest: str | None = connection.execute(query).scalar()
    return digest
