"""Thousands of registered adapters, made in seconds: rows of a real registry, directories of a real store.

All share one file of weights by hard links and differ in a note, so every one has a digest of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.lora_weights import LoraSpec, LoraWeights
from adapters.manifest import MANIFEST
from adapters.peft_format import read_adapter, write_adapter
from adapters.store import AdapterStore
from bench.subject import Subject, random_adapter
from service.database import connect
from service.registry import BaseIdentity, Registry
from service.tables import jobs
from service.tenants import Tenants
from service.versions import AdapterVersion, insert_version

MAX_RANK = 64


class Registered:
    """`num` models of one tenant, named `ft:0`, `ft:1`, …; `load` is the engine's source."""

    def __init__(self, registry: Registry, store: AdapterStore, tenant_id: str, subject: Subject) -> None:
        self._registry = registry
        self._store = store
        self._tenant_id = tenant_id
        self._signature = subject.base.signature

    def digest(self, number: int) -> str:
        """As a request finds it."""
        found = self._registry.resolve(self._tenant_id, f"ft:{number}").digest
        assert found is not None
        return found

    def load(self, digest: str) -> LoraWeights:
        return read_adapter(self._store.read(digest), self._signature, max_rank=MAX_RANK)


@contextmanager
def registered(subject: Subject, directory: Path, num: int) -> Iterator[Registered]:
    """Small adapters: rank 8 on q_proj and v_proj, PEFT's usual choice."""
    fingerprint = subject.base.fingerprint
    digests = _publish(subject, directory, num)
    database = connect(f"sqlite:///{directory / 'bench.db'}")
    try:
        tenant, _ = Tenants(database).create("bench")
        with database.begin() as connection:
            connection.execute(jobs.insert().values(**job_row(tenant.id)))
            for number, digest in enumerate(digests):
                version = AdapterVersion(f"ft:{number}", tenant.id, digest, "job", "bench", fingerprint, {})
                insert_version(connection, version)
        registry = Registry(database, BaseIdentity("bench", fingerprint))
        yield Registered(registry, AdapterStore(str(directory / "store"), directory / "cache"), tenant.id, subject)
    finally:
        database.close()


def _publish(subject: Subject, directory: Path, num: int) -> list[str]:
    spec = LoraSpec(r=8, lora_alpha=16.0, target_modules=("q_proj", "v_proj"))
    weights = random_adapter(subject.sizes, subject.base.signature, 0, spec)
    built = directory / "built"
    write_adapter(built, weights, base_name="bench", base=subject.base.signature)
    files = {path.name: _entry(path.read_bytes()) for path in built.iterdir()}
    digests = []
    for number in range(num):
        note = json.dumps({"number": number}).encode()
        manifest = json.dumps(
            {"version": 1, "files": {**files, "note.json": _entry(note)}}, sort_keys=True, separators=(",", ":")
        ).encode()
        digest = hashlib.sha256(manifest).hexdigest()
        target = directory / "store" / "sha256" / digest
        target.mkdir(parents=True)
        for name in files:
            os.link(built / name, target / name)
        (target / "note.json").write_bytes(note)
        (target / MANIFEST).write_bytes(manifest)
        digests.append(digest)
    return digests


def _entry(content: bytes) -> dict[str, object]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def job_row(tenant_id: str) -> dict[str, object]:
    """The finished job that versions come from."""
    return {
        "id": "job",
        "tenant_id": tenant_id,
        "spec": {},
        "training_file": "none",
        "state": "succeeded",
        "created_at": 0.0,
        "request_digest": "none",
    }
