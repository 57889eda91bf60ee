"""Immutable adapter directories, named by what is in them. Knows their file names and bytes, not their tensors.

    {url}/sha256/{digest}/adapter_config.json, adapter_model.safetensors, small notes, a drift reference, manifest.json
    {url}/quarantine/{digest}.{when}/…  what was found damaged

`manifest.json` lists each file's sha256 and size; the digest is the sha256 of the manifest, so it vouches for every
byte. A directory is there completely or not at all: locally by a rename after fsync, remotely because the manifest is
written last and read first. Nothing that could hold a pickle is accepted. Every read is verified, and what it returns
are the very bytes that were hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from fsspec.implementations.local import LocalFileSystem

from adapters.durable import fsync_path, make_directories
from adapters.errors import AdapterDamagedError, AdapterNotFoundError
from adapters.manifest import MANIFEST, check_manifest, manifest_of, read_stored, sha256_of
from adapters.steps import Reached, unwatched
from adapters.storage import make_parents, open_storage, storage_errors

_PIECE_BYTES = 1024 * 1024
T = TypeVar("T")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Leftover:
    """Something in the store's place that is no adapter: `kind` is temporary, unfinished, quarantined or cached."""

    kind: str
    path: str
    modified_at: float


class AdapterStore:
    """`url` is an fsspec url or a local directory; `cache_dir` holds local copies of a remote store's adapters;
    `reached` hears of the steps of publishing to a local one.

    `on_damage` hears of damage that was mended: `cached_copy` (fetched again), `stored_original` (restored from a good
    copy). What is lost is raised.
    """

    def __init__(
        self,
        url: str,
        cache_dir: Path,
        reached: Reached = unwatched,
        *,
        on_damage: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._filesystem, place = open_storage(url)
        self._root = f"{place}/sha256"
        self._quarantine = f"{place}/quarantine"
        self._is_local = isinstance(self._filesystem, LocalFileSystem)
        self._local = Path(self._root) if self._is_local else cache_dir / "sha256"
        self._reached = reached
        self._on_damage = on_damage
        self._lock = threading.Lock()
        self._transfers: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def publish(self, directory: Path) -> str:
        """Store the files of `directory`, durable when it returns; their digest. What is there already is verified, and
        as young as new: see `touch`.

        Raises AdapterFormatError(check="files") for a file that may not be part of an adapter.
        """
        manifest = manifest_of(directory)
        digest = hashlib.sha256(manifest).hexdigest()
        with storage_errors(f"publishing adapter {digest}"), self._transfer(digest):
            is_there = self._holds(digest)
            if is_there and self._is_local:
                fsync_path(self._local)  # who put it there may have been killed, or have failed, just before this
            elif self._is_local:
                self._install(digest, manifest, lambda name, target: shutil.copyfile(directory / name, target))
            elif not is_there:
                self._upload(digest, manifest, directory)
        return digest

    def read(self, digest: str, names: Collection[str] | None = None) -> dict[str, bytes]:
        """The published files, or those of `names` that were published. Verified every time, from the bytes returned.

        Damaged originals are set aside (`quarantine`), damaged local copies fetched again. Raises AdapterNotFoundError,
        AdapterDamagedError, StoreError.
        """
        path = self._local / _checked(digest)
        with storage_errors(f"reading adapter {digest}"), self._transfer(digest):
            if self._is_local:
                return self._original(digest, lambda: read_stored(path, digest, names))
            try:
                return read_stored(path, digest, names)
            except FileNotFoundError:
                pass
            except AdapterDamagedError:
                self._drop_copy(digest)
            self._original(digest, lambda: self._fetch(digest))
            return read_stored(path, digest, names)

    def verify(self, digest: str, pace: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Read what is stored, from where it is stored, and a local copy of it; `pace` hears of every piece read.

        A good copy mends a damaged original. Raises as `read` does, and sets aside as it does.
        """
        with storage_errors(f"verifying adapter {_checked(digest)}"):
            copy = None if self._is_local else self._good_copy(digest)
            try:
                self._original(digest, lambda: self._hash_all(digest, pace))
            except AdapterDamagedError:
                if copy is None:
                    raise
                self._on_damage("stored_original")
                self._upload(digest, (copy / MANIFEST).read_bytes(), copy)

    def manifest(self, digest: str) -> dict[str, dict[str, Any]]:
        """The published files: name -> sha256, bytes. Only this list is read, and checked against the digest.

        Raises AdapterNotFoundError, AdapterDamagedError, StoreError.
        """
        with storage_errors(f"reading adapter {_checked(digest)}"):
            return self._original(digest, lambda: self._entries(digest))

    def exists(self, digest: str) -> bool:
        with storage_errors(f"looking for adapter {_checked(digest)}"):
            return bool(self._filesystem.exists(self._remote(digest, MANIFEST)))

    def touch(self, digest: str) -> bool:
        """Make a stored adapter as young as one just published, so that nobody sweeps it away before a row names it.
        False when it is not there."""
        with storage_errors(f"touching adapter {_checked(digest)}"), self._transfer(digest):
            return self._touch(digest)

    def delete(self, digest: str) -> None:
        """Forget the adapter; one that is not there is no error."""
        with storage_errors(f"deleting adapter {_checked(digest)}"):
            if not self._is_local and self._filesystem.exists(self._remote(digest)):
                with suppress(FileNotFoundError):
                    self._filesystem.rm_file(self._remote(digest, MANIFEST))  # first: without it nothing is there
                with suppress(FileNotFoundError):
                    self._filesystem.rm(self._remote(digest), recursive=True)
            if (self._local / digest).is_dir():
                _remove(self._local / digest)

    def digests(self) -> list[str]:
        """Every adapter stored, sorted."""
        with storage_errors("listing adapters"):
            return sorted(name for name in self._names() if _DIGEST.fullmatch(name) and self.exists(name))

    def modified_at(self, digest: str) -> float | None:
        """When it was published or touched, unix seconds by the storage's clock; None when it is not there."""
        with storage_errors(f"looking for adapter {_checked(digest)}"):
            return self._modified(self._remote(digest, MANIFEST))

    def is_quarantined(self, digest: str) -> bool:
        """Whether it was found damaged, and nobody has published the same again."""
        return not self.exists(digest) and any(name.startswith(f"{digest}.") for name in self._quarantined())

    def leftovers(self) -> list[Leftover]:
        """What interrupted publishers and readers left, what is in quarantine, and copies of what is gone."""
        with storage_errors("looking for leftovers"):
            return [*self._temporary(), *self._unfinished(), *self._set_aside(), *self._gone_copies()]

    def remove(self, leftover: Leftover) -> None:
        with storage_errors("removing a leftover"):
            if leftover.kind == "cached" or self._is_local or leftover.kind == "temporary":
                shutil.rmtree(leftover.path, ignore_errors=True)
                return
            with suppress(FileNotFoundError):
                self._filesystem.rm(leftover.path, recursive=True)

    # -- originals --------------------------------------------------------------------------------------------

    def _original(self, digest: str, read: Callable[[], T]) -> T:
        """What `read` makes of the original. It is set aside only after a second look: the first may have been a
        faulty transfer."""
        for look in (1, 2):
            try:
                return read()
            except FileNotFoundError:
                if any(name.startswith(f"{digest}.") for name in self._quarantined()):
                    raise AdapterDamagedError(digest, "it is in quarantine") from None
                raise _not_found(digest) from None
            except AdapterDamagedError:
                if look == 2:
                    self._set_apart(digest)
                    raise
        raise AssertionError("unreachable")

    def _set_apart(self, digest: str) -> None:
        """Nobody finds it under its digest any more; what there is of it stays, for whoever wants to know why."""
        place = f"{self._quarantine}/{digest}.{time.time_ns()}"
        if self._is_local:
            make_directories(Path(self._quarantine))
            with suppress(FileNotFoundError):
                os.rename(self._local / digest, place)
            fsync_path(self._local)
            return
        names = [path.rsplit("/", 1)[-1] for path in self._filesystem.ls(self._remote(digest), detail=False)]
        for name in sorted(names, key=lambda name: name != MANIFEST):  # first: without it nothing is there
            with suppress(FileNotFoundError):
                self._filesystem.mv(self._remote(digest, name), f"{place}/{name}")

    def _holds(self, digest: str) -> bool:
        """Whether a good original is there; it is touched then."""
        try:
            self._original(digest, lambda: self._hash_all(digest, lambda num_bytes: None))
        except (AdapterNotFoundError, AdapterDamagedError):
            return False
        return self._touch(digest)

    def _touch(self, digest: str) -> bool:
        path = self._remote(digest, MANIFEST)
        try:
            if self._is_local:
                os.utime(path)
            else:
                self._filesystem.pipe_file(path, self._filesystem.cat_file(path))
        except FileNotFoundError:
            return False
        return True

    def _entries(self, digest: str) -> dict[str, Any]:
        return check_manifest(self._filesystem.cat_file(self._remote(digest, MANIFEST)), digest)

    def _hash_all(self, digest: str, pace: Callable[[int], None]) -> None:
        if self._is_local and (self._local / digest).is_dir():
            read_stored(self._local / digest, digest, ())  # the manifest is there, and no other files are
        for name, entry in self._entries(digest).items():
            counted, found = 0, hashlib.sha256()
            try:
                with self._filesystem.open(self._remote(digest, name), "rb") as stream:
                    while piece := stream.read(_PIECE_BYTES):
                        counted += len(piece)
                        found.update(piece)
                        pace(len(piece))
            except FileNotFoundError:
                raise AdapterDamagedError(digest, f"'{name}' is missing") from None
            if counted != entry["bytes"] or found.hexdigest() != entry["sha256"]:
                raise AdapterDamagedError(digest, f"'{name}' is not what was published")

    def _upload(self, digest: str, manifest: bytes, directory: Path) -> None:
        make_parents(self._filesystem, self._remote(digest, MANIFEST))
        for name in json.loads(manifest)["files"]:
            self._filesystem.put_file(str(directory / name), self._remote(digest, name))
        self._filesystem.pipe_file(self._remote(digest, MANIFEST), manifest)

    # -- local copies -----------------------------------------------------------------------------------------

    def _good_copy(self, digest: str) -> Path | None:
        """Where it lies; a bad one is dropped."""
        try:
            read_stored(self._local / digest, digest, None)
        except FileNotFoundError:
            return None
        except AdapterDamagedError:
            self._drop_copy(digest)
            return None
        return self._local / digest

    def _drop_copy(self, digest: str) -> None:
        self._on_damage("cached_copy")
        with suppress(FileNotFoundError):
            _remove(self._local / digest)

    def _fetch(self, digest: str) -> None:
        """A verified local copy of the original."""
        manifest = self._filesystem.cat_file(self._remote(digest, MANIFEST))
        entries = check_manifest(manifest, digest)

        def copy(name: str, target: Path) -> None:
            try:
                self._filesystem.get_file(self._remote(digest, name), str(target))
            except FileNotFoundError:
                raise AdapterDamagedError(digest, f"'{name}' is missing") from None
            if target.stat().st_size != entries[name]["bytes"] or sha256_of(target) != entries[name]["sha256"]:
                raise AdapterDamagedError(digest, f"'{name}' is not what was published")

        self._install(digest, manifest, copy)

    def _install(self, digest: str, manifest: bytes, copy: Callable[[str, Path], Any]) -> None:
        """Build the directory under another name, make it durable, then let it appear under its digest."""
        make_directories(self._local)
        building = self._local / f".{digest}.{uuid.uuid4().hex}.tmp"
        building.mkdir()
        try:
            names = list(json.loads(manifest)["files"])
            for name in names:
                copy(name, building / name)
            (building / MANIFEST).write_bytes(manifest)
            self._reached("publish.copied")
            for name in (*names, MANIFEST):
                fsync_path(building / name)
            fsync_path(building)
            self._reached("publish.synced")
            _appear(building, self._local / digest)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        self._reached("publish.renamed")
        fsync_path(self._local)
        self._reached("publish.durable")

    # -- what is lying about ----------------------------------------------------------------------------------

    def _temporary(self) -> Iterator[Leftover]:
        for path in self._local.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                yield Leftover("temporary", str(path), path.stat().st_mtime)

    def _unfinished(self) -> Iterator[Leftover]:
        """Uploads without a manifest, as old as their youngest file."""
        if self._is_local:
            return
        for name in self._names():
            if not _DIGEST.fullmatch(name) or self.exists(name):
                continue
            files = self._filesystem.ls(self._remote(name), detail=False)
            times = [time for path in files if (time := self._modified(path)) is not None]
            if times:
                yield Leftover("unfinished", self._remote(name), max(times))

    def _set_aside(self) -> Iterator[Leftover]:
        for name in self._quarantined():
            yield Leftover("quarantined", f"{self._quarantine}/{name}", int(name.rsplit(".", 1)[-1]) / 1e9)

    def _gone_copies(self) -> Iterator[Leftover]:
        if self._is_local or not self._local.is_dir():
            return
        for path in self._local.iterdir():
            if _DIGEST.fullmatch(path.name) and not self.exists(path.name):
                with suppress(FileNotFoundError):
                    yield Leftover("cached", str(path), path.stat().st_mtime)

    def _names(self) -> list[str]:
        return self._listed(self._root)

    def _quarantined(self) -> list[str]:
        return self._listed(self._quarantine)

    def _listed(self, directory: str) -> list[str]:
        try:
            found = self._filesystem.ls(directory, detail=False)
        except FileNotFoundError:
            return []
        return [name for path in found if (name := path.rstrip("/").rsplit("/", 1)[-1])]

    def _modified(self, path: str) -> float | None:
        try:
            return float(self._filesystem.modified(path).timestamp())
        except FileNotFoundError:
            return None

    def _transfer(self, digest: str) -> threading.Lock:
        """Held while an adapter's files move or are read: one thread fetches them, the others find them there."""
        with self._lock:
            return self._transfers.setdefault(digest, threading.Lock())

    def _remote(self, *parts: str) -> str:
        return "/".join((self._root, *parts))


def _appear(building: Path, path: Path) -> None:
    try:
        building.rename(path)
    except OSError:
        if not path.is_dir():  # else somebody published the same bytes just now
            raise


def _remove(path: Path) -> None:
    """Gone at once under its own name, then from the disk."""
    grave = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    os.rename(path, grave)
    fsync_path(path.parent)
    shutil.rmtree(grave)


def _checked(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise AdapterNotFoundError(f"'{digest}' is no adapter digest")
    return digest


def _not_found(digest: str) -> AdapterNotFoundError:
    return AdapterNotFoundError(f"There is no adapter {digest} in the store")
