"""Merges as rows: one at a time, tried again after a crash, bounded on disk, gone when they expire; and over HTTP."""

from __future__ import annotations

import io
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from transformers import LlamaForCausalLM

from adapters.peft_format import write_adapter
from adapters.store import AdapterStore
from service.engine.base_model import BaseModel, load_base_model
from service.errors import ConflictError, NotFoundError
from service.merge_worker import MergeWorker
from service.merges import MAX_ATTEMPTS, MergeGoneError, Merges, MergeState
from service.tables import merges as table
from service.versions import AdapterVersion
from tests.adapters.loras import random_lora
from tests.service.control_fixtures import Control
from tests.service.http_fixtures import Served, serve_fake


@pytest.fixture
def merges(control: Control, tmp_path: Path) -> Merges:
    return Merges(control.database, tmp_path / "merged", max_bytes=1000, ttl_seconds=3600.0)


def _version(control: Control, digest: str = "d" * 64) -> AdapterVersion:
    return control.registry.version(control.acme.id, control.publish(digest=digest))


def _set(control: Control, **values: object) -> None:
    with control.database.begin() as connection:
        connection.execute(table.update().values(**values))


def test_a_merge_goes_its_way_from_queued_to_succeeded(control: Control, merges: Merges) -> None:
    made = merges.create(control.acme.id, _version(control), 100)
    assert made.state is MergeState.QUEUED
    claimed = merges.claim()
    assert claimed is not None and (claimed.id, claimed.attempt) == (made.id, 1)
    assert merges.claim() is None
    (merges.directory(claimed) / "model").write_bytes(b"x")
    merges.renew(claimed)
    merges.succeed(claimed, num_bytes=90, report={"dtype": "bfloat16"})
    done = merges.get(control.acme.id, made.id)
    assert (done.state, done.bytes, done.report) == (MergeState.SUCCEEDED, 90, {"dtype": "bfloat16"})
    assert done.expires_at is not None and done.finished_at is not None
    assert done.expires_at - done.finished_at == pytest.approx(3600, abs=1)
    assert [merge.id for merge in merges.list(control.acme.id)] == [made.id]


def test_the_same_adapter_again_is_the_same_merge_and_another_waits(control: Control, merges: Merges) -> None:
    first, second = _version(control), _version(control, "e" * 64)
    made = merges.create(control.acme.id, first, 100)
    assert merges.create(control.acme.id, first, 100).id == made.id
    with pytest.raises(ConflictError, match=made.id):
        merges.create(control.acme.id, second, 100)
    claimed = merges.claim()
    assert claimed is not None
    merges.fail(claimed, code="x", message="it broke")
    assert merges.get(control.acme.id, made.id).error == {"code": "x", "message": "it broke"}
    assert merges.create(control.acme.id, first, 100).id != made.id  # a failed one may be asked for again


def test_the_disk_has_a_limit_that_deleting_frees(control: Control, merges: Merges) -> None:
    made = merges.create(control.acme.id, _version(control), 900)
    claimed = merges.claim()
    assert claimed is not None
    merges.succeed(claimed, num_bytes=900, report={})
    other = _version(control, "e" * 64)
    with pytest.raises(ConflictError, match="100 of 1000 are free") as caught:
        merges.create(control.acme.id, other, 200)
    assert caught.value.code == "merge_disk_full"
    merges.delete(control.acme.id, made.id)
    assert not merges.directory(made).exists()
    assert merges.create(control.acme.id, other, 200).state is MergeState.QUEUED


def test_a_crash_means_another_attempt_and_three_mean_failure(control: Control, merges: Merges) -> None:
    made = merges.create(control.acme.id, _version(control), 100)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        claimed = merges.claim()
        assert claimed is not None and claimed.attempt == attempt
        assert list(merges.directory(claimed).iterdir()) == []  # what the last attempt left is gone
        (merges.directory(claimed) / "half").write_bytes(b"x")
        _set(control, lease_expires_at=1.0)
    assert merges.claim() is None
    lost = merges.get(control.acme.id, made.id)
    assert lost.state is MergeState.FAILED and lost.error is not None and lost.error["code"] == "worker_lost"
    assert claimed is not None
    with pytest.raises(MergeGoneError):
        merges.succeed(claimed, num_bytes=1, report={})


def test_a_worker_whose_merge_was_taken_or_deleted_writes_nothing(control: Control, merges: Merges) -> None:
    merges.create(control.acme.id, _version(control), 100)
    first = merges.claim()
    _set(control, lease_expires_at=1.0)
    second = merges.claim()
    assert first is not None and second is not None
    with pytest.raises(MergeGoneError):
        merges.renew(first)
    merges.renew(second)
    merges.delete(control.acme.id, second.id)
    with pytest.raises(MergeGoneError):
        merges.renew(second)


def test_what_expired_is_hidden_at_once_and_swept_with_what_nobody_knows(control: Control, merges: Merges) -> None:
    made = merges.create(control.acme.id, _version(control), 100)
    claimed = merges.claim()
    assert claimed is not None
    stray = merges.directory(claimed).with_name("merge-stray")
    stray.mkdir()
    merges.sweep()
    assert merges.directory(claimed).is_dir() and not stray.exists()
    merges.succeed(claimed, num_bytes=1, report={})
    _set(control, expires_at=1.0)
    with pytest.raises(NotFoundError):
        merges.get(control.acme.id, made.id)
    merges.sweep()
    assert not merges.directory(claimed).exists()
    with control.database.read() as connection:
        assert connection.execute(sa.select(table.c.id)).all() == []


def test_another_tenants_merge_is_not_there(control: Control, merges: Merges) -> None:
    made = merges.create(control.acme.id, _version(control), 100)
    for action in (merges.get, merges.delete):
        with pytest.raises(NotFoundError):
            action(control.zenith.id, made.id)
    assert merges.list(control.zenith.id) == []


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> BaseModel:
    return load_base_model(str(tiny_llama_dir), quantization="none", device="cpu", name="tiny")


@pytest.fixture
def merging(base: BaseModel, tmp_path: Path) -> Iterator[tuple[Served, MergeWorker, str]]:
    """A service that takes merges, its worker (not started), and a model of acme's."""
    store = AdapterStore(str(tmp_path / "adapters"), tmp_path / "cache")
    write_adapter(tmp_path / "a", random_lora(base.signature, seed=1), base_name="tiny", base=base.signature)
    digest = store.publish(tmp_path / "a")
    with serve_fake(tmp_path) as served:
        merges = Merges(served.control.database, tmp_path / "merged", max_bytes=1 << 30, ttl_seconds=3600.0)
        served.add_merges(merges, base)
        model = served.control.publish(digest=digest)
        yield served, MergeWorker(merges, store, base, max_rank=64, poll_seconds=0.01), model


def test_a_merged_model_is_asked_for_made_beside_serving_and_downloaded(
    merging: tuple[Served, MergeWorker, str], base: BaseModel, tmp_path: Path
) -> None:
    served, worker, model = merging
    http = served.http()
    made = http.post(f"/v1/adapters/{model}/merge").raise_for_status().json()
    assert (made["object"], made["status"], made["model"]) == ("adapter.merge", "queued", model)
    early = http.get(f"/v1/merges/{made['id']}/content")
    assert (early.status_code, early.json()["error"]["code"]) == (400, "merge_not_ready")
    before = base.parameter_hash()
    worker.start()
    deadline = time.monotonic() + 60
    while (merge := http.get(f"/v1/merges/{made['id']}").json())["status"] not in ("succeeded", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker.stop()
    assert merge["error"] is None and merge["report"]["dtype"] == "float32", merge
    assert base.parameter_hash() == before
    with zipfile.ZipFile(io.BytesIO(http.get(f"/v1/merges/{made['id']}/content").content)) as archive:
        archive.extractall(tmp_path / "out")
    LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert http.get("/v1/merges").json()["data"] == [merge]
    theirs = served.http(served.control.zenith_key)
    assert theirs.get(f"/v1/merges/{made['id']}/content").status_code == 404
    assert theirs.post(f"/v1/adapters/{model}/merge").status_code == 404
    assert http.delete(f"/v1/merges/{made['id']}").json()["deleted"]
    assert http.get(f"/v1/merges/{made['id']}").status_code == 404


def test_a_merge_of_a_model_that_is_deleted_meanwhile_is_still_made(
    merging: tuple[Served, MergeWorker, str],
) -> None:
    served, worker, model = merging
    made = served.http().post(f"/v1/adapters/{model}/merge").json()
    served.http().delete(f"/v1/models/{model}").raise_for_status()
    worker.start()
    served.wait_until(lambda: served.http().get(f"/v1/merges/{made['id']}").json()["status"] == "succeeded")
    worker.stop()


def test_a_merge_whose_adapter_is_gone_fails_and_says_so(
    merging: tuple[Served, MergeWorker, str], tmp_path: Path
) -> None:
    served, worker, model = merging
    made = served.http().post(f"/v1/adapters/{model}/merge").json()
    shutil.rmtree(tmp_path / "adapters" / "sha256" / served.control.registry.versions(served.control.acme.id)[0].digest)
    worker.start()
    served.wait_until(lambda: served.http().get(f"/v1/merges/{made['id']}").json()["status"] == "failed")
    worker.stop()
    error = served.http().get(f"/v1/merges/{made['id']}").json()["error"]
    assert error["code"] == "adapter_not_found"


def test_a_service_without_merging_says_so(tmp_path: Path) -> None:
    with serve_fake(tmp_path) as served:
        answer = served.http().get("/v1/merges")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "merging_off")
