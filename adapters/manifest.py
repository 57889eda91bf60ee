"""What a stored adapter consists of: which files may be part of it, and the manifest that vouches for their bytes.

Knows local directories, and no store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from adapters.drift.reference import TENSORS
from adapters.errors import AdapterDamagedError, AdapterFormatError

REQUIRED_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})
NOTE_SUFFIXES = frozenset({".json", ".md", ".csv"})
MAX_NOTE_BYTES = 4 * 1024 * 1024
MAX_REFERENCE_BYTES = 32 * 1024 * 1024
"""Of the drift reference's tensors, whose directions are as long as the base's hidden states."""
MANIFEST = "manifest.json"


def manifest_of(directory: Path) -> bytes:
    files = sorted(directory.iterdir(), key=lambda path: path.name)
    for path in files:
        _check_file(path)
    names = {path.name for path in files}
    if not names >= REQUIRED_FILES:
        missing = ", ".join(sorted(REQUIRED_FILES - names))
        raise AdapterFormatError(f"An adapter directory needs {missing}", check="files")
    entries = {path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in files}
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


def read_stored(path: Path, digest: str, names: Collection[str] | None) -> dict[str, bytes]:
    """Raises FileNotFoundError when there is no such directory."""
    if not path.is_dir():
        raise FileNotFoundError(path)
    try:
        files = check_manifest((path / MANIFEST).read_bytes(), digest)
    except FileNotFoundError:
        if not path.is_dir():
            raise  # deleted just now
        raise AdapterDamagedError(digest, "its manifest is missing") from None
    _check_names(path, digest, files)
    found = {}
    for name in files if names is None else sorted(files.keys() & set(names)):
        content = (path / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != files[name]["sha256"]:
            raise AdapterDamagedError(digest, f"'{name}' is not what was published")
        found[name] = content
    return found


def _check_names(path: Path, digest: str, files: Collection[str]) -> None:
    names = {entry.name for entry in path.iterdir()} - {MANIFEST}
    if names != set(files):
        raise AdapterDamagedError(digest, f"its files are {sorted(names)} instead of {sorted(files)}")


def check_manifest(manifest: bytes, digest: str) -> dict[str, Any]:
    if hashlib.sha256(manifest).hexdigest() != digest:
        raise AdapterDamagedError(digest, "its manifest is not what was published")
    files: dict[str, Any] = json.loads(manifest)["files"]
    return files


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
