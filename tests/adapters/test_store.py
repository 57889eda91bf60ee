"""The adapter store: durable, immutable, verified; on a local directory and on a remote file system."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from adapters.errors import AdapterFormatError, AdapterNotFoundError, StoreError
from adapters.store import MANIFEST, MAX_NOTE_BYTES, AdapterStore

UNKNOWN = "0" * 64


def _adapter(path: Path, weights: bytes = b"weights", **notes: str) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text('{"r": 8}')
    (path / "adapter_model.safetensors").write_bytes(weights)
    for name, text in notes.items():
        (path / name.replace("_", ".")).write_text(text)
    return path


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "store")
        return
    yield "memory://rootstock-store-test"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def store(url: str, tmp_path: Path) -> AdapterStore:
    return AdapterStore(url, tmp_path / "cache")


def _restarted(url: str, tmp_path: Path, cache: str = "cache") -> AdapterStore:
    return AdapterStore(url, tmp_path / cache)


def test_a_published_adapter_is_read_back_byte_for_byte(store: AdapterStore, tmp_path: Path) -> None:
    digest = store.publish(_adapter(tmp_path / "a", b"\x00\xff" * 1000, README_md="a card", eval_csv="step,loss"))
    directory = store.directory(digest)
    assert (directory / "adapter_model.safetensors").read_bytes() == b"\x00\xff" * 1000
    assert (directory / "README.md").read_text() == "a card"
    assert {path.name for path in directory.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "eval.csv", MANIFEST
    }  # fmt: skip


def test_the_digest_is_the_sha256_of_a_manifest_that_lists_every_file(store: AdapterStore, tmp_path: Path) -> None:
    digest = store.publish(_adapter(tmp_path / "a", b"abc"))
    manifest = (store.directory(digest) / MANIFEST).read_bytes()
    assert hashlib.sha256(manifest).hexdigest() == digest
    assert json.loads(manifest)["files"]["adapter_model.safetensors"] == {
        "sha256": hashlib.sha256(b"abc").hexdigest(),
        "bytes": 3,
    }


def test_the_same_files_have_the_same_digest_and_other_files_another(store: AdapterStore, tmp_path: Path) -> None:
    first = store.publish(_adapter(tmp_path / "a"))
    assert store.publish(_adapter(tmp_path / "b")) == first
    assert store.publish(_adapter(tmp_path / "c", b"other")) != first
    assert len(store.digests()) == 2


def test_a_new_process_finds_what_was_published(store: AdapterStore, url: str, tmp_path: Path) -> None:
    digest = store.publish(_adapter(tmp_path / "a"))
    again = _restarted(url, tmp_path, "fresh-cache")
    assert again.digests() == [digest] and again.exists(digest)
    assert (again.directory(digest) / "adapter_model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", MANIFEST])
def test_one_flipped_byte_in_the_store_is_found_on_load(
    store: AdapterStore, url: str, tmp_path: Path, name: str
) -> None:
    digest = store.publish(_adapter(tmp_path / "a"))
    filesystem, root = fsspec.core.url_to_fs(url)
    path = f"{root}/sha256/{digest}/{name}"
    damaged = bytearray(filesystem.cat_file(path))
    damaged[3] ^= 1
    filesystem.pipe_file(path, bytes(damaged))
    with pytest.raises(AdapterFormatError, match="damaged") as caught:
        _restarted(url, tmp_path).directory(digest)
    assert caught.value.check == "digest"


def test_a_file_smuggled_into_a_published_directory_is_found_on_load(tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path / "store"), tmp_path / "cache")
    digest = store.publish(_adapter(tmp_path / "a"))
    (tmp_path / "store" / "sha256" / digest / "extra.bin").write_bytes(b"x")
    with pytest.raises(AdapterFormatError, match=r"extra\.bin"):
        store.directory(digest)


def test_a_directory_without_its_manifest_is_refused(tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path / "store"), tmp_path / "cache")
    digest = store.publish(_adapter(tmp_path / "a"))
    (tmp_path / "store" / "sha256" / digest / MANIFEST).unlink()
    with pytest.raises(AdapterFormatError, match="manifest is missing"):
        store.directory(digest)


def test_the_bytes_are_hashed_once_per_process(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.publish(_adapter(tmp_path / "a"))
    directory = store.directory(digest)
    monkeypatch.setattr("adapters.store._verify", lambda path, digest: pytest.fail("verified again"))
    assert store.directory(digest) == directory


def test_a_damaged_cached_copy_is_fetched_again_from_the_remote_store(tmp_path: Path) -> None:
    url = "memory://rootstock-cache-test"
    digest = AdapterStore(url, tmp_path / "cache").publish(_adapter(tmp_path / "a"))
    cached = AdapterStore(url, tmp_path / "cache").directory(digest) / "adapter_model.safetensors"
    cached.write_bytes(b"WEIGHTS")
    assert AdapterStore(url, tmp_path / "cache").directory(digest) == cached.parent
    assert cached.read_bytes() == b"weights"
    fsspec.filesystem("memory").store.clear()


def test_an_upload_cut_short_leaves_nothing_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore("memory://rootstock-cut-test", tmp_path / "cache")
    memory = fsspec.filesystem("memory")

    def fail(path: str, data: bytes) -> None:
        raise OSError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "pipe_file", fail)
        with pytest.raises(StoreError, match="connection lost"):
            store.publish(_adapter(tmp_path / "a"))
    assert store.digests() == []
    digest = store.publish(tmp_path / "a")
    assert store.digests() == [digest]
    memory.store.clear()


def test_a_local_publish_cut_short_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(str(tmp_path / "store"), tmp_path / "cache")

    def fail(path: Path) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("adapters.store.fsync_path", fail)
        with pytest.raises(StoreError, match="disk full"):
            store.publish(_adapter(tmp_path / "a"))
    assert list((tmp_path / "store" / "sha256").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adapter_model.bin", "may not be part"),
        ("weights.pkl", "may not be part"),
        ("optimizer.pt", "may not be part"),
        (MANIFEST, "may not be part"),
        (".hidden.json", "may not be part"),
    ],
)
def test_a_file_that_could_hold_a_pickle_or_hide_is_refused(
    store: AdapterStore, tmp_path: Path, name: str, reason: str
) -> None:
    directory = _adapter(tmp_path / "a")
    (directory / name).write_bytes(b"x")
    with pytest.raises(AdapterFormatError, match=reason) as caught:
        store.publish(directory)
    assert caught.value.check == "files"


def test_a_drift_reference_is_part_of_an_adapter_and_of_its_digest(store: AdapterStore, tmp_path: Path) -> None:
    directory = _adapter(tmp_path / "a")
    without = store.publish(directory)
    (directory / "drift.json").write_text("{}")
    (directory / "drift.safetensors").write_bytes(b"x" * (MAX_NOTE_BYTES + 1))
    digest = store.publish(directory)
    assert digest != without
    assert {"drift.json", "drift.safetensors"} < store.manifest(digest).keys()
    assert (store.directory(digest) / "drift.safetensors").stat().st_size > MAX_NOTE_BYTES


def test_links_folders_and_huge_notes_are_refused(store: AdapterStore, tmp_path: Path) -> None:
    linked = _adapter(tmp_path / "a")
    (linked / "passwd.json").symlink_to("/etc/passwd")
    nested = _adapter(tmp_path / "b")
    (nested / "more.json").mkdir()
    huge = _adapter(tmp_path / "c", notes_md="x" * (MAX_NOTE_BYTES + 1))
    for directory in (linked, nested, huge):
        with pytest.raises(AdapterFormatError):
            store.publish(directory)


def test_an_incomplete_adapter_is_refused_naming_what_is_missing(store: AdapterStore, tmp_path: Path) -> None:
    directory = _adapter(tmp_path / "a")
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFormatError, match=r"needs adapter_model\.safetensors"):
        store.publish(directory)


def test_an_unknown_or_malformed_digest_is_not_found(store: AdapterStore) -> None:
    for digest in (UNKNOWN, "../../etc", "", UNKNOWN.upper() + "A"):
        with pytest.raises(AdapterNotFoundError):
            store.directory(digest)
    assert not store.exists(UNKNOWN)


def test_a_deleted_adapter_is_gone_and_deleting_it_twice_is_fine(store: AdapterStore, tmp_path: Path) -> None:
    digest = store.publish(_adapter(tmp_path / "a"))
    store.directory(digest)
    store.delete(digest)
    store.delete(digest)
    assert store.digests() == [] and not store.exists(digest)
    with pytest.raises(AdapterNotFoundError):
        store.directory(digest)
    assert store.publish(tmp_path / "a") == digest
    assert store.directory(digest).is_dir()


def test_many_threads_may_publish_and_read_the_same_adapter(store: AdapterStore, tmp_path: Path) -> None:
    directory = _adapter(tmp_path / "a", b"w" * 100_000)
    digests: list[str] = []

    def work() -> None:
        digest = store.publish(directory)
        store.directory(digest)
        digests.append(digest)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 8 and len(set(digests)) == 1
    assert store.digests() == [digests[0]]
