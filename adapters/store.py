"""Immutable adapter directories, named by what is in them. Knows their file names and bytes, not their tensors.

    {url}/sha256/{digest}/adapter_config.json, adapter_model.safetensors, small notes, a drift reference, manifest.json

`manifest.json` lists each file's sha256 and size; the digest is the sha256 of the manifest, so it vouches for every
byte. A directory is there completely or not at all: locally by a rename after fsync, remotely because the manifest is
written last and read first. Nothing that could hold a pickle is accepted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import fsspec
from fsspec.implementations.local import LocalFileSystem

from adapters.drift.reference import TENSORS
from adapters.durable import fsync_path, make_directories
from adapters.errors import AdapterFormatError, AdapterNotFoundError, StoreError
from adapters.steps import Reached, unwatched

REQUIRED_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})
NOTE_SUFFIXES = frozenset({".json", ".md", ".csv"})
MAX_NOTE_BYTES = 4 * 1024 * 1024
MAX_REFERENCE_BYTES = 32 * 1024 * 1024
"""Of the drift reference's tensors, whose directions are as long as the base's hidden states."""
MANIFEST = "manifest.json"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class AdapterStore:
    """`url` is an fsspec url or a local directory; `cache_dir` holds local copies of a remote store's adapters;
    `reached` hears of the steps of publishing to a local one."""

    def __init__(self, url: str, cache_dir: Path, reached: Reached = unwatched) -> None:
        self._filesystem, root = fsspec.core.url_to_fs(url)
        self._root = f"{root.rstrip('/')}/sha256"
        self._is_local = isinstance(self._filesystem, LocalFileSystem)
        self._local = Path(self._root) if self._is_local else cache_dir / "sha256"
        self._reached = reached
        self._verified: set[str] = set()
        self._lock = threading.Lock()
        self._transfers: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def publish(self, directory: Path) -> str:
        """Store the files of `directory`, durable when it returns; their digest. The same files again cost nothing.

        Raises AdapterFormatError(check="files") for a file that may not be part of an adapter.
        """
        manifest = _manifest_of(directory)
        digest = hashlib.sha256(manifest).hexdigest()
        with _store_errors(f"publishing adapter {digest}"), self._transfer(digest):
            is_there = self.exists(digest)
            if is_there and self._is_local:
                fsync_path(self._local)  # who put it there may have been killed, or have failed, just before this
            elif self._is_local:
                self._install(digest, manifest, lambda name, target: shutil.copyfile(directory / name, target))
            elif not is_there:
                self._upload(digest, manifest, directory)
        return digest

    def directory(self, digest: str) -> Path:
        """A local directory with exactly the published files. The bytes are checked once per process.

        Raises AdapterNotFoundError, AdapterFormatError(check="digest") when a byte has changed, StoreError.
        """
        path = self._local / _checked(digest)
        with self._lock:
            verified = digest in self._verified
        if verified and path.is_dir():
            return path
        with _store_errors(f"reading adapter {digest}"), self._transfer(digest):
            if self._is_local:
                _verify_present(path, digest)
            else:
                self._verify_or_fetch(path, digest)
        with self._lock:
            self._verified.add(digest)
        return path

    def manifest(self, digest: str) -> dict[str, dict[str, Any]]:
        """The published files: name -> sha256, bytes. Only this list is read, and checked against the digest.

        Raises AdapterNotFoundError, AdapterFormatError(check="digest"), StoreError.
        """
        with _store_errors(f"reading adapter {_checked(digest)}"):
            try:
                manifest = self._filesystem.cat_file(self._remote(digest, MANIFEST))
            except FileNotFoundError:
                raise _not_found(digest) from None
        return _check_manifest(manifest, digest)

    def exists(self, digest: str) -> bool:
        return bool(self._filesystem.exists(self._remote(_checked(digest), MANIFEST)))

    def delete(self, digest: str) -> None:
        """Forget the adapter; one that is not there is no error."""
        with self._lock:
            self._verified.discard(_checked(digest))
        with _store_errors(f"deleting adapter {digest}"):
            if not self._is_local and self.exists(digest):
                self._filesystem.rm_file(self._remote(digest, MANIFEST))  # first: without it nothing is there
                self._filesystem.rm(self._remote(digest), recursive=True)
            if (self._local / digest).is_dir():
                _remove(self._local / digest)

    def digests(self) -> list[str]:
        """Every adapter stored, sorted."""
        with _store_errors("listing adapters"):
            if not self._filesystem.isdir(self._root):
                return []
            names = [path.rstrip("/").rsplit("/", 1)[-1] for path in self._filesystem.ls(self._root, detail=False)]
            return sorted(name for name in names if _DIGEST.fullmatch(name) and self.exists(name))

    def _upload(self, digest: str, manifest: bytes, directory: Path) -> None:
        self._filesystem.makedirs(self._remote(digest), exist_ok=True)
        for name in json.loads(manifest)["files"]:
            self._filesystem.put_file(str(directory / name), self._remote(digest, name))
        self._filesystem.pipe_file(self._remote(digest, MANIFEST), manifest)

    def _verify_or_fetch(self, path: Path, digest: str) -> None:
        if path.is_dir():
            try:
                _verify(path, digest)
                return
            except AdapterFormatError:
                _remove(path)  # only a copy: the store has the original
        self._fetch(digest)
        _verify(path, digest)

    def _fetch(self, digest: str) -> None:
        try:
            manifest = self._filesystem.cat_file(self._remote(digest, MANIFEST))
        except FileNotFoundError:
            raise _not_found(digest) from None
        _check_manifest(manifest, digest)
        self._install(digest, manifest, lambda name, to: self._filesystem.get_file(self._remote(digest, name), str(to)))

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

    def _transfer(self, digest: str) -> threading.Lock:
        """Held while an adapter's files move or are checked: one thread does it, the others find it done."""
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


def _manifest_of(directory: Path) -> bytes:
    files = sorted(directory.iterdir(), key=lambda path: path.name)
    for path in files:
        _check_file(path)
    names = {path.name for path in files}
    if not names >= REQUIRED_FILES:
        missing = ", ".join(sorted(REQUIRED_FILES - names))
        raise AdapterFormatError(f"An adapter directory needs {missing}", check="files")
    entries = {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in files}
    return json.dumps({"version": 1, "files": entries}, sort_keys=True, separators=(",", ":")).encode()


def _check_file(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        raise AdapterFormatError(f"'{path.name}' is no plain file", check="files")
    if path.name in REQUIRED_FILES:
        return
    limit = MAX_REFERENCE_BYTES if path.name == TENSORS else MAX_NOTE_BYTES
    is_note = path.name == TENSORS or path.suffix in NOTE_SUFFIXES
    if path.name == MANIFEST or path.name.startswith(".") or not is_note:
        raise AdapterFormatError(
            f"'{path.name}' may not be part of an adapter: only {', '.join(sorted(REQUIRED_FILES))}, {TENSORS} and "
            "notes in .json, .md or .csv",
            check="files",
        )
    if path.stat().st_size > limit:
        raise AdapterFormatError(f"'{path.name}' is longer than {limit} bytes", check="files")


def _verify_present(path: Path, digest: str) -> None:
    if not path.is_dir():
        raise _not_found(digest)
    _verify(path, digest)


def _verify(path: Path, digest: str) -> None:
    try:
        manifest = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise _changed(digest, "its manifest is missing") from None
    files = _check_manifest(manifest, digest)
    names = {entry.name for entry in path.iterdir()} - {MANIFEST}
    if names != set(files):
        raise _changed(digest, f"its files are {sorted(names)} instead of {sorted(files)}")
    for name, entry in files.items():
        if (path / name).stat().st_size != entry["bytes"] or _sha256(path / name) != entry["sha256"]:
            raise _changed(digest, f"'{name}' is not what was published")


def _check_manifest(manifest: bytes, digest: str) -> dict[str, Any]:
    if hashlib.sha256(manifest).hexdigest() != digest:
        raise _changed(digest, "its manifest is not what was published")
    files: dict[str, Any] = json.loads(manifest)["files"]
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def _changed(digest: str, how: str) -> AdapterFormatError:
    return AdapterFormatError(f"Adapter {digest} was damaged: {how}", check="digest")


@contextmanager
def _store_errors(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"The adapter store failed while {action}: {error}") from error
