"""A PEFT directory as a zip, in and out. Knows names and bytes, not tensors.

What comes in is hostile until proven otherwise: nothing is written but the files an adapter consists of, under names
chosen here, and every size is limited before and while it is read.
"""

from __future__ import annotations

import io
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from adapters.errors import AdapterFormatError
from adapters.peft_config import CONFIG_NAME
from adapters.peft_format import WEIGHTS_NAME

README_NAME = "README.md"
MAX_CONFIG_BYTES = 256 * 1024
MAX_README_BYTES = 1024 * 1024
MAX_ENTRIES = 16
MAX_DIRECTORY_BYTES = 64 * 1024
MAX_RATIO = 100
"""Unpacked to packed bytes. Float weights hardly shrink; what shrinks more is no adapter."""

_CHUNK = 1024 * 1024
_END_RECORD, _ZIP64_LOCATOR = b"PK\x05\x06", b"PK\x06\x07"
_END_BYTES, _LOCATOR_BYTES = 22, 20
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def unpack(archive: BinaryIO, directory: Path, *, max_weights_bytes: int) -> None:
    """Write the adapter's two files into `directory`, an existing empty one. A README is allowed and left out.

    The files lie at the archive's top or in one folder.

    Raises:
        AdapterFormatError: `check` is "archive" (not a zip that is taken here), "files" or "pickle".
    """
    limits = {CONFIG_NAME: MAX_CONFIG_BYTES, WEIGHTS_NAME: max_weights_bytes, README_NAME: MAX_README_BYTES}
    try:
        _check_directory_size(archive)
        with zipfile.ZipFile(archive) as opened:
            entries = _entries(opened, limits)
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                if name not in entries:
                    raise AdapterFormatError(f"{name} is missing", check="files")
                _extract(opened, entries[name], directory / name, limits[name])
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, ValueError) as error:
        raise AdapterFormatError(f"the file is no readable zip archive: {error}", check="archive") from None


def zip_chunks(files: Mapping[str, Path | bytes]) -> Iterator[bytes]:
    """A zip of these files, piece by piece, the same bytes for the same files. Paths are opened before the first."""
    with ExitStack() as stack:
        sources: dict[str, BinaryIO] = {
            name: io.BytesIO(source) if isinstance(source, bytes) else stack.enter_context(source.open("rb"))
            for name, source in files.items()
        }
        yield b""  # a caller that asks for this knows that nothing is missing; files deleted now are still read
        sink = _Sink()
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
            for name, source in sources.items():
                entry = zipfile.ZipInfo(name)  # dated 1980-01-01
                entry.external_attr = (stat.S_IFREG | 0o644) << 16
                with archive.open(entry, "w", force_zip64=True) as target:
                    while chunk := source.read(_CHUNK):
                        target.write(chunk)
                        yield sink.taken()
        yield sink.taken()


class _Sink(io.RawIOBase):
    """Where zipfile writes to; it cannot seek, so zipfile puts the sizes behind each file."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        part = bytes(data)  # type: ignore[call-overload]
        self._parts.append(part)
        return len(part)

    def taken(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


def _check_directory_size(archive: BinaryIO) -> None:
    """Before zipfile reads it: millions of tiny entries would fill the memory. A comment or zip64 could hide them."""
    size = archive.seek(0, io.SEEK_END)
    archive.seek(max(0, size - _END_BYTES - _LOCATOR_BYTES))
    tail = archive.read()
    end = tail[-_END_BYTES:]
    if len(end) < _END_BYTES or not end.startswith(_END_RECORD) or not end.endswith(b"\0\0"):
        raise AdapterFormatError("the file is no zip archive, or has a comment at its end", check="archive")
    if tail[: len(tail) - _END_BYTES].startswith(_ZIP64_LOCATOR):
        raise AdapterFormatError("zip64 archives are refused: no adapter needs one", check="archive")
    if int.from_bytes(end[12:16], "little") > MAX_DIRECTORY_BYTES:
        raise AdapterFormatError("the archive lists too many files", check="archive")
    archive.seek(0)


def _entries(archive: zipfile.ZipFile, limits: Mapping[str, int]) -> dict[str, zipfile.ZipInfo]:
    """The allowed files by name. Anything else in the archive is refused, and named."""
    listed = archive.infolist()
    if len(listed) > MAX_ENTRIES:
        raise AdapterFormatError(f"the archive holds more than {MAX_ENTRIES} entries", check="archive")
    found: dict[str, zipfile.ZipInfo] = {}
    folders = set()
    for entry in listed:
        folder, name = _split(entry)
        folders.add(folder)
        if len(folders) > 1:
            raise AdapterFormatError("the files must lie at the archive's top, or all in one folder", check="files")
        if not name:
            continue
        if name.endswith(_PICKLES):
            raise AdapterFormatError(f"'{name}': pickled weights are refused; save as safetensors", check="pickle")
        if name not in limits:
            raise AdapterFormatError(f"'{name}' is not part of an adapter: only {', '.join(limits)} are", check="files")
        if name in found:
            raise AdapterFormatError(f"'{name}' is there twice", check="files")
        _check_entry(entry, name, limits[name])
        found[name] = entry
    return found


def _split(entry: zipfile.ZipInfo) -> tuple[str, str]:
    """(folder, name); a directory's own entry has no name."""
    path = entry.orig_filename
    parts = path.split("/")
    if "\\" in path or "\0" in path or ":" in path or not path or parts[0] == "" or not {".", ".."}.isdisjoint(parts):
        raise AdapterFormatError(f"{path!r} leads out of the archive", check="files")
    if len(parts) > 2:
        raise AdapterFormatError(f"{path!r} lies too deep: one folder at most", check="files")
    return ("", parts[0]) if len(parts) == 1 else (parts[0], parts[1])


def _check_entry(entry: zipfile.ZipInfo, name: str, limit: int) -> None:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise AdapterFormatError(f"'{name}' is no plain file", check="files")
    if entry.flag_bits & 1:
        raise AdapterFormatError("encrypted archives are refused", check="archive")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise AdapterFormatError(f"'{name}' is packed by another method than deflate", check="archive")
    if entry.file_size > limit:
        raise AdapterFormatError(f"'{name}' is longer than {limit} bytes", check="files")
    if name == WEIGHTS_NAME and entry.file_size > MAX_RATIO * max(entry.compress_size, 1):
        raise AdapterFormatError(f"'{name}' unpacks to more than {MAX_RATIO} times its size", check="archive")


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, limit: int) -> None:
    """What the archive says of sizes is not believed: what comes out is counted."""
    num_bytes = 0
    with archive.open(entry) as source, path.open("xb") as target:
        while chunk := source.read(_CHUNK):
            num_bytes += len(chunk)
            if num_bytes > limit:
                raise AdapterFormatError(f"'{path.name}' is longer than {limit} bytes", check="files")
            target.write(chunk)
