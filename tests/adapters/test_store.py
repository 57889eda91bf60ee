"""The adapter store: durable, immutable, verified; on a local directory, a remote file system and an S3 service."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from adapters.errors import AdapterDamagedError, AdapterFormatError, AdapterNotFoundError, StoreError
from adapters.manifest import MANIFEST, MAX_NOTE_BYTES
from adapters.store import AdapterStore
from tests.buckets import SECRET, new_bucket, s3_service, use_s3

UNKNOWN = "0" * 64


def _adapter(path: Path, weights: bytes = b"weights", **notes: str) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text('{"r": 8}')
    (path / "adapter_model.safetensors").write_bytes(weights)
    for name, text in notes.items():
        (path / name.replace("_", ".")).write_text(text)
    return path


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    with s3_service() as service:
        yield service


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "store")
        return
    if request.param == "s3":
        service = request.getfixturevalue("s3")
        use_s3(monkeypatch, service)
        yield new_bucket(service)
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
    files = store.read(digest)
    assert files["adapter_model.safetensors"] == b"\x00\xff" * 1000
    assert files["README.md"] == b"a card"
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md", "eval.csv"}
    assert store.read(digest, ("README.md", "nothing.json")) == {"README.md": b"a card"}


def test_the_digest_is_the_sha256_of_a_manifest_that_lists_every_file(store: AdapterStore, tmp_path: Path) -> None:
    digest = store.publish(_adapter(tmp_path / "a", b"abc"))
    manifest = _Stored(store).content(digest, MANIFEST)
    assert hashlib.sha256(manifest).hexdigest() == digest
    assert store.manifest(digest) == json.loads(manifest)["files"]
    assert store.manifest(digest)["adapter_model.safetensors"] == {
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
    assert again.read(digest)["adapter_model.safetensors"] == b"weights"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", MANIFEST])
@pytest.mark.parametrize("by", ["read", "verify"])
def test_one_flipped_byte_in_the_store_is_found_and_set_aside(
    store: AdapterStore, url: str, tmp_path: Path, name: str, by: str
) -> None:
    digest = store.publish(_adapter(tmp_path / "a"))
    _Stored(store).flip(digest, name)
    again = _restarted(url, tmp_path)
    with pytest.raises(AdapterDamagedError, match=r"was damaged: (its|')") as caught:
        getattr(again, by)(digest)
    assert (caught.value.check, caught.value.digest) == ("digest", digest)
    assert again.is_quarantined(digest) and not again.exists(digest) and again.digests() == []
    with pytest.raises(AdapterDamagedError, match="in quarantine"):
        again.read(digest)
    assert [leftover.kind for leftover in again.leftovers()] == ["quarantined"]
    assert store.publish(tmp_path / "a") == digest, "the same bytes mend it"
    assert again.read(digest)["adapter_model.safetensors"] == b"weights" and not again.is_quarantined(digest)


def test_a_byte_that_flips_after_an_adapter_was_read_is_found_at_the_next_read(
    store: AdapterStore, tmp_path: Path
) -> None:
    digest = store.publish(_adapter(tmp_path / "a"))
    store.read(digest)
    on_disk = tmp_path / ("store" if (tmp_path / "store").is_dir() else "cache") / "sha256" / digest
    (on_disk / "adapter_model.safetensors").write_bytes(b"wEights")
    if on_disk.parent.parent.name == "cache":  # only a copy: fetched again
        assert store.read(digest)["adapter_model.safetensors"] == b"weights"
        return
    with pytest.raises(AdapterDamagedError):
        store.read(digest)


def test_a_missing_part_is_damage(store: AdapterStore, tmp_path: Path) -> None:
    digest = store.publish(_adapter(tmp_path / "a"))
    _Stored(store).remove(digest, "adapter_model.safetensors")
    with pytest.raises(AdapterDamagedError, match=r"adapter_model\.safetensors|its files are"):
        store.read(digest)
    assert store.is_quarantined(digest)


def test_publishing_what_is_there_but_damaged_mends_it(store: AdapterStore, tmp_path: Path) -> None:
    """It said that the adapter was there already, and whoever published it got a row without good bytes."""
    digest = store.publish(_adapter(tmp_path / "a"))
    _Stored(store).flip(digest, "adapter_model.safetensors")
    assert store.publish(tmp_path / "a") == digest
    assert store.read(digest)["adapter_model.safetensors"] == b"weights"


def test_publishing_again_makes_an_adapter_young(store: AdapterStore, tmp_path: Path) -> None:
    digest = store.publish(_adapter(tmp_path / "a"))
    _Stored(store).age(digest)
    before = store.modified_at(digest)
    assert before is not None and store.touch(digest)
    touched = store.modified_at(digest)
    assert touched is not None and touched >= before
    _Stored(store).age(digest)
    store.publish(tmp_path / "a")
    after = store.modified_at(digest)
    assert after is not None and after >= touched - 1
    assert not store.touch(UNKNOWN) and store.modified_at(UNKNOWN) is None


def test_one_bad_transfer_sets_nothing_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore("memory://rootstock-transfer-test", tmp_path / "cache")
    digest = store.publish(_adapter(tmp_path / "a"))
    memory, real, calls = fsspec.filesystem("memory"), fsspec.filesystem("memory").get_file, [0]

    def garbled(remote: str, local: str) -> None:
        real(remote, local)
        calls[0] += 1
        if calls[0] == 1:
            Path(local).write_bytes(b"garbled")

    monkeypatch.setattr(memory, "get_file", garbled)
    assert store.read(digest)["adapter_model.safetensors"] == b"weights" and calls[0] > 1
    memory.store.clear()


def test_a_file_smuggled_into_a_published_directory_is_found_on_load(tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path / "store"), tmp_path / "cache")
    digest = store.publish(_adapter(tmp_path / "a"))
    (tmp_path / "store" / "sha256" / digest / "extra.bin").write_bytes(b"x")
    with pytest.raises(AdapterDamagedError, match=r"extra\.bin"):
        store.read(digest)


def test_a_directory_without_its_manifest_is_refused_and_mended_by_publishing(tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path / "store"), tmp_path / "cache")
    digest = store.publish(_adapter(tmp_path / "a"))
    (tmp_path / "store" / "sha256" / digest / MANIFEST).unlink()
    with pytest.raises(AdapterDamagedError, match="manifest is missing"):
        store.read(digest)
    assert store.publish(tmp_path / "a") == digest and store.read(digest)
    (tmp_path / "store" / "sha256" / digest / MANIFEST).unlink()
    assert store.publish(tmp_path / "a") == digest and store.read(digest), "nobody read it meanwhile"


def test_a_damaged_cached_copy_is_told_and_fetched_again_from_the_remote_store(tmp_path: Path) -> None:
    url, told = "memory://rootstock-cache-test", list[str]()
    store = AdapterStore(url, tmp_path / "cache", on_damage=told.append)
    digest = store.publish(_adapter(tmp_path / "a"))
    cached = tmp_path / "cache" / "sha256" / digest / "adapter_model.safetensors"
    for check in (store.read, store.verify):
        store.read(digest)
        cached.write_bytes(b"WEIGHTS")
        check(digest)
        assert store.read(digest)["adapter_model.safetensors"] == cached.read_bytes() == b"weights"
    assert told == ["cached_copy", "cached_copy"]
    fsspec.filesystem("memory").store.clear()


def test_a_good_copy_mends_a_damaged_original(tmp_path: Path) -> None:
    url, told = "memory://rootstock-mend-test", list[str]()
    store = AdapterStore(url, tmp_path / "cache", on_damage=told.append)
    digest = store.publish(_adapter(tmp_path / "a"))
    store.read(digest)
    _Stored(store).flip(digest, "adapter_model.safetensors")
    store.verify(digest)
    assert told == ["stored_original"]
    assert AdapterStore(url, tmp_path / "fresh").read(digest)["adapter_model.safetensors"] == b"weights"
    fsspec.filesystem("memory").store.clear()


def test_what_is_lying_about_is_told_by_kind_and_can_be_removed(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store.publish(_adapter(tmp_path / "a"))
    store.read(kept)
    stored = _Stored(store)
    crashed = tmp_path / ("store" if (tmp_path / "store").is_dir() else "cache") / "sha256" / f".{UNKNOWN}.1.tmp"
    crashed.mkdir()
    kinds = ["temporary"]
    if not (tmp_path / "store").is_dir():
        stored.filesystem.pipe_file(stored.path(UNKNOWN, "adapter_config.json"), b"{}")
        (tmp_path / "cache" / "sha256" / ("1" * 64)).mkdir()
        kinds = ["cached", "temporary", "unfinished"]
    found = store.leftovers()
    assert sorted(leftover.kind for leftover in found) == kinds
    assert all(abs(leftover.modified_at - time.time()) < 60 for leftover in found)
    assert store.digests() == [kept], "none of it is an adapter"
    for leftover in found:
        store.remove(leftover)
    assert store.leftovers() == [] and store.read(kept)


@pytest.mark.slow
def test_an_unreachable_bucket_is_told_without_its_keys_and_local_copies_go_on(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    use_s3(monkeypatch, s3)
    url = new_bucket(s3)
    digest = AdapterStore(url, tmp_path / "cache").publish(_adapter(tmp_path / "a"))
    other = AdapterStore(url, tmp_path / "cache").publish(_adapter(tmp_path / "b", b"other"))
    AdapterStore(url, tmp_path / "cache").read(digest)
    use_s3(monkeypatch, "http://127.0.0.1:9")
    away = AdapterStore(url, tmp_path / "cache")
    assert away.read(digest)["adapter_model.safetensors"] == b"weights"
    for call in (lambda: away.read(other), lambda: away.publish(tmp_path / "b"), away.digests):
        with pytest.raises(StoreError, match="EndpointConnectionError"):
            call()
    use_s3(monkeypatch, s3)
    with pytest.raises(StoreError) as denied:
        AdapterStore("s3://a-bucket-that-is-not-there/x", tmp_path / "none").publish(tmp_path / "b")
    assert SECRET not in caplog.text and SECRET not in str(denied.value)


class _Stored:
    """The bytes behind a store, for those who damage them."""

    def __init__(self, store: AdapterStore) -> None:
        self.filesystem, self.path = store._filesystem, store._remote

    def content(self, digest: str, name: str) -> bytes:
        content: bytes = self.filesystem.cat_file(self.path(digest, name))
        return content

    def flip(self, digest: str, name: str) -> None:
        damaged = bytearray(self.content(digest, name))
        damaged[3] ^= 1
        self.filesystem.pipe_file(self.path(digest, name), bytes(damaged))

    def remove(self, digest: str, name: str) -> None:
        self.filesystem.rm_file(self.path(digest, name))

    def age(self, digest: str) -> None:
        """By an hour, where that can be done."""
        path = Path(self.path(digest, MANIFEST))
        if path.is_file():
            os.utime(path, (time.time() - 3600, time.time() - 3600))


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
    assert len(store.read(digest)["drift.safetensors"]) > MAX_NOTE_BYTES


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
            store.read(digest)
    assert not store.exists(UNKNOWN)


def test_a_deleted_adapter_is_gone_and_deleting_it_twice_is_fine(store: AdapterStore, tmp_path: Path) -> None:
    digest = store.publish(_adapter(tmp_path / "a"))
    store.read(digest)
    store.delete(digest)
    store.delete(digest)
    assert store.digests() == [] and not store.exists(digest)
    with pytest.raises(AdapterNotFoundError):
        store.read(digest)
    assert store.publish(tmp_path / "a") == digest
    assert store.read(digest)


def test_many_threads_may_publish_and_read_the_same_adapter(store: AdapterStore, tmp_path: Path) -> None:
    directory = _adapter(tmp_path / "a", b"w" * 100_000)
    digests: list[str] = []

    def work() -> None:
        digest = store.publish(directory)
        store.read(digest)
        digests.append(digest)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 8 and len(set(digests)) == 1
    assert store.digests() == [digests[0]]
