"""Fixture `target`: one service with a real engine for the whole corpus, and two tenants in it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from service.engine.base_model import load_base_model
from tests.hostile.harness import Target
from tests.service.control_fixtures import BASE
from tests.service.real_service import ADAPTER, serve_real


@contextmanager
def own_temporary_directory() -> Iterator[None]:
    """What lies in it was left by this process, not by tests that run beside it."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="rootstock-hostile-") as name:
        os.chmod(name, 0o755)  # a Postgres that later tests start runs as somebody else
        tempfile.tempdir = name
        try:
            yield
        finally:
            tempfile.tempdir = before


@pytest.fixture(scope="session")
def target(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    base = load_base_model(str(tiny_llama_dir), quantization="none", name="tiny")
    signature = replace(base.signature, fingerprint=BASE.fingerprint)  # as the tests' control plane calls it
    base = replace(base, fingerprint=BASE.fingerprint, signature=signature)
    directory = tmp_path_factory.mktemp("hostile")
    with own_temporary_directory(), serve_real(base, directory) as service:
        control = service.control
        names = {
            "file": control.upload(),
            "model": service.tuned,
            "job": control.create_job().id,
            "other_file": control.upload(control.zenith),
            "other_job": control.create_job(control.zenith).id,
            "other_tenant": control.zenith.id,
            "key": service.key,
        }
        claim = control.claim()
        while claim.job.tenant_id != control.zenith.id:
            claim = control.claim()
        names["other_model"] = control.finish(claim, ADAPTER)
        control.registry.aliases.set(control.zenith.id, "theirs", names["other_model"])
        control.registry.aliases.set(control.acme.id, "mine", service.tuned)
        yield Target(service, directory, names)
