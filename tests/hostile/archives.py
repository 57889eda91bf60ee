"""Hostile archives of adapters: each a right one with one thing wrong."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.lora_weights import BaseSignature
from adapters.peft_format import write_adapter
from tests.adapters.archives import contents, with_symlink, zipped
from tests.adapters.loras import random_lora
from tests.hostile.cases import Request, form, part

Files = dict[str, bytes]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Archive:
    make: Callable[[Files], bytes]
    says: str = ""
    status: int = 400


def honest(signature: BaseSignature) -> Files:
    """The two files of an adapter that would be taken."""
    with tempfile.TemporaryDirectory() as name:
        write_adapter(Path(name), random_lora(signature, seed=8), base_name="tiny", base=signature)
        return contents(Path(name))


def import_of(archive: bytes) -> Request:
    return form("/v1/adapters", part("suffix", b"evil"), part("file", archive, "evil.zip"))


def _with(**others: bytes) -> Callable[[Files], bytes]:
    return lambda files: zipped({**files, **others}).read()


def _named(name: str) -> Callable[[Files], bytes]:
    return lambda files: zipped({**files, name: b"x"}).read()


def _config(**changes: Any) -> Callable[[Files], bytes]:
    return _with_config(lambda config: json.dumps({**config, **changes}).encode())


def _with_config(write: Callable[[dict[str, Any]], bytes]) -> Callable[[Files], bytes]:
    return lambda files: zipped({**files, CONFIG: write(json.loads(files[CONFIG]))}).read()


def _weights(change: Callable[[bytes], bytes]) -> Callable[[Files], bytes]:
    return lambda files: zipped({**files, WEIGHTS: change(files[WEIGHTS])}, method=0).read()


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[Files], bytes]:
    """The tensors' own account of themselves, changed."""

    def changed(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return _weights(changed)


def _first(header: dict[str, Any]) -> dict[str, Any]:
    tensor: dict[str, Any] = header[sorted(header.keys() - {"__metadata__"})[0]]
    return tensor


def _overlapping(header: dict[str, Any]) -> None:
    names = sorted(header.keys() - {"__metadata__"})
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def _nan(data: bytes) -> bytes:
    return data[:-4] + struct.pack("<f", float("nan"))


ARCHIVES: dict[str, Archive] = {
    "no zip": Archive(lambda _: b"PK nothing", "archive"),
    "an empty file": Archive(lambda _: b"", "archive"),
    "half a zip": Archive(lambda files: zipped(files).read()[:-40], "archive"),
    "a name that climbs": Archive(_named("../../etc/cron.d/evil"), "leads out"),
    "an absolute name": Archive(_named("/etc/passwd"), "leads out"),
    "a name that climbs on Windows": Archive(_named("..\\evil"), "leads out"),
    "a drive's name": Archive(_named("C:evil"), "leads out"),
    "a symlink": Archive(lambda files: with_symlink(WEIGHTS, "/etc/passwd", {CONFIG: files[CONFIG]}).read(), "plain"),
    "a pickle beside the weights": Archive(_named("adapter_model.bin"), "pickle"),
    "a pickle instead of the weights": Archive(
        lambda files: zipped({CONFIG: files[CONFIG], "adapter_model.bin": b"\x80\x04cposix\nsystem\n."}).read(),
        "pickle",
    ),
    "a pickle named safetensors": Archive(_weights(lambda _: b"\x80\x04\x95cposix\nsystem\n." * 9), "safetensors"),
    "code of one's own": Archive(_named("modeling_evil.py"), "not part of an adapter"),
    "a bomb": Archive(_with(**{WEIGHTS: bytes(1_000_000)}), "times its size"),
    "1000 entries": Archive(lambda files: zipped({f"a{n}/b": b"" for n in range(1000)}).read(), "archive"),
    "a header beyond the file": Archive(_weights(lambda data: struct.pack("<Q", 2**40) + data[8:]), "safetensors"),
    "a header of 2^64 - 1": Archive(_weights(lambda data: b"\xff" * 8 + data[8:]), "safetensors"),
    "a header of no JSON": Archive(_weights(lambda data: data[:8] + b"}" + data[9:]), "safetensors"),
    "a tensor beyond the file": Archive(
        _header(lambda header: _first(header).update(data_offsets=[0, 2**50])), "safetensors"
    ),
    "a tensor of negative length": Archive(
        _header(lambda header: _first(header).update(data_offsets=[64, 0])), "safetensors"
    ),
    "tensors that overlap": Archive(_header(_overlapping), "safetensors"),
    "a shape of 2^62": Archive(_header(lambda header: _first(header).update(shape=[2**62, 8])), "safetensors"),
    "tensors of integers": Archive(_header(lambda header: _first(header).update(dtype="I32")), "dtype"),
    "a tensor named like code": Archive(_header(lambda header: header.update(__class__=_first(header))), "safetensors"),
    "weights that are NaN": Archive(_weights(_nan), "finite"),
    "weights cut off": Archive(_weights(lambda data: data[:-100]), "safetensors"),
    "rank 100 000": Archive(_config(r=100_000), "rank"),
    "rank below 0": Archive(_config(r=-1), "rank"),
    "rank as a boolean": Archive(_config(r=True), "config"),
    "a rank of 10 000 digits": Archive(
        _with_config(lambda config: json.dumps(config).replace('"r": 8', '"r": ' + "9" * 10_000).encode()), "config"
    ),
    "alpha NaN": Archive(_config(lora_alpha=float("nan")), "config"),
    "another base's name": Archive(_config(base_model_name_or_path="evil/base"), "base"),
    "a base named by nesting": Archive(
        _with_config(
            lambda config: (
                json.dumps({**config, "base_model_name_or_path": "X"}).replace('"X"', "[" * 900 + "]" * 900).encode()
            )
        )
    ),
    "a config 10 000 deep": Archive(_with_config(lambda _: b"[" * 10_000 + b"]" * 10_000), "config"),
    "a config that is a list": Archive(_with_config(lambda _: b"[]"), "config"),
    "a config with a key twice": Archive(
        _with_config(lambda config: json.dumps(config)[:-1].encode() + b',"r":9999}'), "r"
    ),
    "auto_map": Archive(_config(auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "modules to save": Archive(_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "targets as a pattern": Archive(_config(target_modules="(a+)+$"), "regular expression"),
    "a rank for a pattern": Archive(_config(rank_pattern={"(a+)+$": 4}), "regular expressions"),
    "a config of 1 MB": Archive(_config(peft_version="a" * 1_000_000), "longer"),
}
