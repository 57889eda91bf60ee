"""An adapter trained again from what was kept with it: the same digest, or the reason why not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adapters.store import AdapterStore
from service.cli import app
from service.database import connect
from service.engine.base_model import load_base_model
from service.files import FilePurpose, Files
from service.job import Hyperparameters, JobSpec
from service.job_queue import JobQueue
from service.jobs import Idempotency, Jobs
from service.reproduction import NoEngine, Reproducer, Reproduction, ReproductionError, find_version_anywhere
from service.resume_points import ResumePoints
from service.tables import adapter_versions
from service.tenants import Tenants
from service.tuning import Outcome, TuningRun, TuningServices
from tests.service.tuning_fixtures import QUICK, Tally, Workshop, medlars, tiny_base, workshop

__all__ = ["tiny_base", "workshop"]

CONTINUED = Hyperparameters(n_epochs=1, batch_size=8, learning_rate=5e-3)
SHORT = replace(QUICK, n_epochs=2, lora_dropout=0.1)


def _trained(workshop: Workshop, **spec: Any) -> str:
    """A model's id, from a job that ran through (but for its evaluation, which changes no weight)."""
    job = workshop.submit(**{"hyperparameters": SHORT, **spec})
    assert (
        TuningRun(replace(workshop.services, engine=NoEngine()), workshop.control.claim(), lambda: None).execute()
        is Outcome.SUCCEEDED
    )
    model = workshop.job(job).fine_tuned_model
    assert model is not None
    return model


def _reproducer(workshop: Workshop, model: str, **options: Any) -> Reproducer:
    version = find_version_anywhere(workshop.control.database, model)
    return Reproducer(version, workshop.control.files, workshop.store, **options)


def _again(workshop: Workshop, model: str, **options: Any) -> Reproduction:
    reproducer = _reproducer(workshop, model, **options)
    reproducer.check()
    return reproducer.run(workshop.base)


@pytest.mark.slow
def test_the_same_data_recipe_and_seed_give_the_same_digest_and_write_nothing(workshop: Workshop) -> None:
    model = _trained(workshop, validation_file=workshop.upload(medlars(3)), alias="best")
    before = workshop.store.digests(), workshop.control.jobs.list(workshop.control.acme.id).items
    result = _again(workshop, model)
    assert result.same and result.digest == result.expected
    assert result.differences == ()
    assert (workshop.store.digests(), workshop.control.jobs.list(workshop.control.acme.id).items) == before


@pytest.mark.slow
def test_a_checkpoint_is_trained_again_too(workshop: Workshop) -> None:
    model = _trained(workshop)
    assert _again(workshop, f"{model}:ckpt-step-5").same


@pytest.mark.slow
def test_a_continued_adapter_needs_its_parent(workshop: Workshop) -> None:
    first = _trained(workshop)
    parent = workshop.control.registry.resolve(workshop.control.acme.id, first).digest
    model = _trained(workshop, model=first, parent_digest=parent, hyperparameters=CONTINUED)
    assert _again(workshop, model).same
    assert parent is not None
    workshop.store.delete(parent)
    with pytest.raises(ReproductionError, match=f"{parent}, was deleted"):
        _again(workshop, model)


@pytest.mark.slow
def test_a_deleted_file_is_named_and_a_copy_does_in_its_place(workshop: Workshop, tmp_path: Path) -> None:
    rows = [json.dumps(row) + "\n" for row in medlars(24)]
    model = _trained(workshop)
    note = find_version_anywhere(workshop.control.database, model).provenance
    assert note is not None
    file = note["data"]["training_file"]
    workshop.control.files.delete(workshop.control.acme.id, file["id"])
    with pytest.raises(ReproductionError, match=f"{file['id']}.*was deleted.*--training-file"):
        _again(workshop, model)
    copy = tmp_path / "copy.jsonl"
    copy.write_text("".join(rows))
    assert _again(workshop, model, given={"training_file": copy}).same
    copy.write_text("".join([*rows[:-1], rows[-1].replace("medlar", "quince")]))
    with pytest.raises(ReproductionError, match=r"is not the one that was trained on: its sha256 is [0-9a-f]{64}"):
        _again(workshop, model, given={"training_file": copy})


@pytest.mark.slow
def test_a_file_that_was_changed_on_disk_is_noticed(workshop: Workshop) -> None:
    model = _trained(workshop)
    note = find_version_anywhere(workshop.control.database, model).provenance
    assert note is not None
    path = workshop.control.storage / workshop.control.acme.id / note["data"]["training_file"]["id"]
    path.write_bytes(path.read_bytes().replace(b"word 7?", b"word 8?"))
    with pytest.raises(ReproductionError, match="is not the one"):
        _reproducer(workshop, model).check()


@pytest.mark.slow
def test_another_seed_would_give_another_digest_and_is_told(workshop: Workshop) -> None:
    """The comparison can fail."""
    model = _trained(workshop)
    version = find_version_anywhere(workshop.control.database, model)
    note = json.loads(json.dumps(version.provenance))
    note["job"]["spec"]["seed"] += 1
    note["software"]["torch"] = "1.0"
    result = Reproducer(replace(version, provenance=note), workshop.control.files, workshop.store).run(workshop.base)
    assert not result.same and result.digest not in (None, result.expected)
    assert result.differences == (f"torch was 1.0, is {torch.__version__}",)


@pytest.mark.slow
def test_another_base_is_refused(workshop: Workshop) -> None:
    reproducer = _reproducer(workshop, _trained(workshop))
    with pytest.raises(ReproductionError, match="fingerprint"):
        reproducer.run(replace(workshop.base, fingerprint="f" * 64))


def test_what_cannot_be_trained_again_says_why(workshop: Workshop) -> None:
    model = workshop.control.publish()
    with pytest.raises(ReproductionError, match="kept too little"):
        find_version_anywhere(workshop.control.database, model)
    with pytest.raises(ReproductionError, match="no model 'best'"):
        find_version_anywhere(workshop.control.database, "best")
    with workshop.control.database.begin() as connection:
        connection.execute(adapter_versions.update().values(provenance={"origin": "import", "format": 1}))
    with pytest.raises(ReproductionError, match="was imported"):
        find_version_anywhere(workshop.control.database, model)


def test_the_command_tells_what_was_compared_where_the_digest_covers_a_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Reproduction("e" * 64, "d" * 64, True, (), {"adapter_model.safetensors": "a" * 64})
    monkeypatch.setattr("service.cli.reproduce._run", lambda *_: found)
    told = CliRunner().invoke(app, ["adapters", "reproduce", "ft:tiny:acme:x", "--data-dir", str(tmp_path)])
    assert told.exit_code == 0
    assert f"same weights: adapter_model.safetensors {'a' * 64}" in told.stdout.replace("\n", " ")


@pytest.fixture
def data_dir(tiny_llama_dir: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A service's data directory after one job on a 4-bit base; the model's id."""
    base = load_base_model(str(tiny_llama_dir), quantization="nf4", device="cpu", name="tiny")
    database = connect(f"sqlite:///{tmp_path / 'rootstock.db'}")
    files = Files(database, str(tmp_path / "storage" / "files"))
    tenant, _ = Tenants(database).create("acme")
    rows = [json.dumps(row).encode() + b"\n" for row in medlars(16)]
    file = files.create(tenant.id, "train.jsonl", FilePurpose.FINE_TUNE, rows)
    spec = JobSpec("tiny", "tiny", file.id, seed=7, hyperparameters=Hyperparameters(n_epochs=1, lora_r=4))
    job = Jobs(database).create(tenant.id, spec, Idempotency("", retry=False))
    queue = JobQueue(database)
    services = TuningServices(
        queue=queue,
        files=files,
        store=AdapterStore(str(tmp_path / "storage" / "adapters"), tmp_path / "cache"),
        resume_points=ResumePoints(str(tmp_path / "storage")),
        base=base,
        engine=NoEngine(),
        observer=Tally(),
        max_lora_rank=64,
    )
    claim = queue.claim("w")
    assert claim is not None
    TuningRun(services, claim, lambda: None).execute()
    model = Jobs(database).get(tenant.id, job.id).fine_tuned_model
    database.close()
    assert model is not None
    yield tmp_path, model


@pytest.mark.slow
def test_the_command_compares_digests_beside_a_data_directory(
    data_dir: tuple[Path, str], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    directory, model = data_dir
    command = ["adapters", "reproduce", model, "--data-dir", str(directory), "--base", str(tiny_llama_dir)]
    same = CliRunner().invoke(app, command)
    assert same.exit_code == 0, same.output
    assert "same digest: " in same.stdout
    (file,) = (p for p in (directory / "storage" / "files").rglob("file-*") if b"messages" in p.read_bytes())
    file.write_bytes(file.read_bytes().replace(b"word 3?", b"word 4?"))
    changed = CliRunner().invoke(app, command)
    assert changed.exit_code == 1 and "is not the one that was trained on" in changed.stderr
    nowhere = CliRunner().invoke(app, [*command[:3], "--data-dir", str(tiny_llama_dir)])
    assert nowhere.exit_code == 2 and "there is no database" in nowhere.stderr
