"""Adapters as zips: what PEFT saved goes in, what goes out is whole, and no hostile archive writes elsewhere."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import AdapterFormatError
from adapters.peft_archive import MAX_DIRECTORY_BYTES, unpack, zip_chunks
from tests.adapters.archives import with_symlink, zipped

CONFIG, WEIGHTS, README = "adapter_config.json", "adapter_model.safetensors", "README.md"
GOOD = {CONFIG: b"{}", WEIGHTS: bytes(range(256)) * 4}
LIMIT = 1 << 20


def test_the_two_files_come_out_as_they_are_and_the_readme_stays_behind(tmp_path: Path) -> None:
    unpack(zipped({**GOOD, README: b"# hello"}), tmp_path, max_weights_bytes=LIMIT)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == GOOD


def test_one_folder_around_the_files_is_fine(tmp_path: Path) -> None:
    unpack(zipped({f"mine/{n}": c for n, c in GOOD.items()} | {"mine/": b""}), tmp_path, max_weights_bytes=LIMIT)
    assert {path.name for path in tmp_path.iterdir()} == set(GOOD)


def test_what_zip_chunks_makes_is_the_same_each_time_and_unpacks(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(GOOD[WEIGHTS])
    files: dict[str, Path | bytes] = {CONFIG: GOOD[CONFIG], WEIGHTS: tmp_path / "weights", README: b"hello"}
    first, second = (b"".join(zip_chunks(files)) for _ in range(2))
    assert first == second
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        assert archive.testzip() is None
        assert archive.read(README) == b"hello"
    (tmp_path / "out").mkdir()
    unpack(io.BytesIO(first), tmp_path / "out", max_weights_bytes=LIMIT)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == GOOD[WEIGHTS]


def test_files_deleted_while_they_are_sent_still_arrive(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(GOOD[WEIGHTS])
    chunks = zip_chunks({WEIGHTS: path})
    next(chunks)
    path.unlink()
    with zipfile.ZipFile(io.BytesIO(b"".join(chunks))) as archive:
        assert archive.read(WEIGHTS) == GOOD[WEIGHTS]


def _without(name: str) -> dict[str, bytes]:
    return {other: content for other, content in GOOD.items() if other != name}


def _patched(change: Callable[[bytearray], None]) -> io.BytesIO:
    raw = bytearray(zipped(GOOD, method=zipfile.ZIP_STORED).getvalue())
    change(raw)
    return io.BytesIO(bytes(raw))


def _central(raw: bytearray, name: str) -> int:
    """Where the central directory speaks of `name`."""
    return raw.rindex(name.encode()) - 46


def _lie_about_size(raw: bytearray) -> None:
    """The directory says that the weights are four bytes long; more of them lie there."""
    struct.pack_into("<I", raw, _central(raw, WEIGHTS) + 24, 4)


def _encrypt(raw: bytearray) -> None:
    raw[_central(raw, WEIGHTS) + 8] |= 1


def _many(count: int) -> io.BytesIO:
    return zipped({f"{n}": b"" for n in range(count)})


def _zip64() -> io.BytesIO:
    raw = zipped(GOOD).getvalue()
    return io.BytesIO(raw[:-22] + b"PK\x06\x07" + bytes(16) + raw[-22:])


def _twice() -> io.BytesIO:
    buffer = zipped(GOOD)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(CONFIG, b"[]")
    buffer.seek(0)
    return buffer


REFUSED: list[tuple[str, Callable[[], io.BytesIO]]] = [
    ("archive", lambda: io.BytesIO(b"")),
    ("archive", lambda: io.BytesIO(b"no zip at all" * 100)),
    ("archive", lambda: io.BytesIO(zipped(GOOD).getvalue()[:-30])),
    ("archive", lambda: io.BytesIO(zipped(GOOD).getvalue()[:-2] + b"\x05\x00hello")),
    ("archive", lambda: _many(17)),
    ("archive", lambda: _many(3000)),
    ("archive", _zip64),
    ("archive", lambda: _patched(_encrypt)),
    ("archive", lambda: _patched(_lie_about_size)),
    ("archive", lambda: zipped(GOOD, method=zipfile.ZIP_LZMA)),
    ("archive", lambda: zipped({**GOOD, WEIGHTS: bytes(LIMIT)})),
    ("files", lambda: zipped({**GOOD, WEIGHTS: bytes(LIMIT + 1)}, method=zipfile.ZIP_STORED)),
    ("files", lambda: zipped({**GOOD, CONFIG: b"{" * (300 << 10)})),
    ("files", lambda: zipped(_without(CONFIG))),
    ("files", lambda: zipped(_without(WEIGHTS))),
    ("files", lambda: zipped({**GOOD, "extra.py": b"print()"})),
    ("files", lambda: zipped({**GOOD, "../../evil.json": b"{}"})),
    ("files", lambda: zipped({**GOOD, "/etc/passwd": b"{}"})),
    ("files", lambda: zipped({**GOOD, "..\\evil.json": b"{}"})),
    ("files", lambda: zipped({f"../{name}": content for name, content in GOOD.items()})),
    ("files", lambda: zipped({f"a/b/{name}": content for name, content in GOOD.items()})),
    ("files", lambda: zipped({CONFIG: GOOD[CONFIG], f"other/{WEIGHTS}": GOOD[WEIGHTS]})),
    ("files", lambda: with_symlink(WEIGHTS, "/etc/passwd", _without(WEIGHTS))),
    ("files", _twice),
    ("pickle", lambda: zipped({**_without(WEIGHTS), "adapter_model.bin": b"\x80\x04."})),
]


@pytest.mark.parametrize(("check", "archive"), REFUSED)
def test_a_hostile_or_foreign_archive_is_refused_and_leaves_nothing_outside(
    check: str, archive: Callable[[], io.BytesIO], tmp_path: Path
) -> None:
    target = tmp_path / "in" / "here"
    target.mkdir(parents=True)
    with pytest.raises(AdapterFormatError) as refusal:
        unpack(archive(), target, max_weights_bytes=LIMIT)
    assert refusal.value.check == check
    assert [path for path in tmp_path.rglob("*") if path.is_file() and target not in path.parents] == []
    assert sum(path.stat().st_size for path in target.iterdir()) <= LIMIT + (256 << 10)


def test_a_long_list_of_entries_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = _many(3000)
    assert int.from_bytes(archive.getvalue()[-10:-6], "little") > MAX_DIRECTORY_BYTES
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("zipfile saw the archive"))
    with pytest.raises(AdapterFormatError, match="too many"):
        unpack(archive, tmp_path, max_weights_bytes=LIMIT)
