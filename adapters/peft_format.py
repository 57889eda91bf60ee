"""PEFT's LoRA directories, read with every check and written so that plain PEFT loads them.

A directory is `adapter_config.json` + `adapter_model.safetensors` (PEFT 0.5 and later). Knows the shape of the
base model (`BaseSignature`), not the base itself, and nothing of slots or stores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from math import inf, isfinite, prod
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from adapters.adapter_files import AdapterSource, content, is_file, names
from adapters.errors import AdapterFormatError, BaseMismatchError
from adapters.lora_weights import BaseSignature, LinearShape, LoraPair, LoraSpec, LoraWeights
from adapters.peft_config import CONFIG_NAME, read_config
from adapters.tensor_file import TensorFile

WEIGHTS_NAME = "adapter_model.safetensors"
_KEY_PREFIX = "base_model.model."
_LORA_KEY = re.compile(re.escape(_KEY_PREFIX) + r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_FLOAT_DTYPES = {"F32", "F16", "BF16", "F64"}


def read_adapter(source: AdapterSource, base: BaseSignature, *, max_rank: int) -> LoraWeights:
    """Read a PEFT LoRA directory, or its files, for this base. Each file is read once.

    Raises:
        AdapterFormatError: `check` names what failed: files, pickle, config, unsupported, rank, base,
            safetensors, match, shape, dtype, finite.
    """
    _check_files(source)
    spec = read_config(content(source, CONFIG_NAME), base, max_rank)
    expected = {name: base.modules[name] for name in spec.matching(base)}
    tensors = _read_tensors(source, base, expected, spec)
    modules = {name: _pair(name, spec, tensors) for name in expected}
    _check_finite(modules)
    return LoraWeights(spec, modules)


def max_weights_bytes(base: BaseSignature, max_rank: int) -> int:
    """No weights file of an adapter for this base is longer: every module at `max_rank` in 8-byte floats, copies of
    the embeddings, and what safetensors needs to name them."""
    tensors = sum(max_rank * (shape.in_features + shape.out_features) * 8 for shape in base.modules.values())
    copies = sum(prod(tensor.shape) * 8 for tensor in base.embeddings.values())
    return tensors + copies + 1024 * (2 * len(base.modules) + 64)


def base_check(directory: Path) -> Literal["fingerprint", "name", "shapes"]:
    """How far a directory that `read_adapter` has taken vouches for its base: by the base's fingerprint, by its name
    only, or not at all, so that nothing but shapes was compared."""
    if TensorFile((directory / WEIGHTS_NAME).read_bytes()).metadata.get("base_fingerprint"):
        return "fingerprint"
    named = json.loads((directory / CONFIG_NAME).read_text()).get("base_model_name_or_path")
    return "name" if named else "shapes"


def write_adapter(
    directory: Path,
    weights: LoraWeights,
    *,
    base_name: str,
    base: BaseSignature,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `weights` as a PEFT directory. The base's fingerprint travels in the safetensors metadata."""
    directory.mkdir(parents=True, exist_ok=True)
    spec = weights.spec
    targets = _written_targets(spec, weights, base)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": spec.r,
        "lora_alpha": spec.lora_alpha,
        "lora_dropout": spec.lora_dropout,
        "use_rslora": spec.use_rslora,
        "target_modules": targets,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "layers_to_transform": list(spec.layers_to_transform) if spec.layers_to_transform is not None else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {}
    for name, pair in weights.modules.items():
        tensors[f"{_KEY_PREFIX}{name}.lora_A.weight"] = pair.a.detach().to("cpu", dtype).contiguous()
        tensors[f"{_KEY_PREFIX}{name}.lora_B.weight"] = pair.b.detach().to("cpu", dtype).contiguous()
    data = save(tensors, metadata={"format": "pt", "base_fingerprint": base.fingerprint})
    (directory / WEIGHTS_NAME).write_bytes(_with_sorted_metadata(data))


def _with_sorted_metadata(data: bytes) -> bytes:
    """The same safetensors file; the library writes metadata in random order, so equal weights had two digests."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    encoded = json.dumps(header, separators=(",", ":")).encode()
    assert len(encoded) <= size
    return data[:8] + encoded.ljust(size) + data[8 + size :]


def _check_files(source: AdapterSource) -> None:
    if not is_file(source, CONFIG_NAME):
        raise AdapterFormatError(f"{CONFIG_NAME} is missing", check="files")
    if not is_file(source, WEIGHTS_NAME):
        if any(name.endswith((".bin", ".pt", ".pkl")) for name in names(source)):
            raise AdapterFormatError("pickled weights are refused; save as safetensors", check="pickle")
        raise AdapterFormatError(f"{WEIGHTS_NAME} is missing", check="files")


def _read_tensors(
    source: AdapterSource, base: BaseSignature, expected: Mapping[str, LinearShape], spec: LoraSpec
) -> dict[str, torch.Tensor]:
    """All LoRA tensors by `module.lora_A|B`. Shapes are checked on the header, before any tensor is made."""
    try:
        file = TensorFile(content(source, WEIGHTS_NAME))
        fingerprint = file.metadata.get("base_fingerprint")
        if fingerprint is not None and fingerprint != base.fingerprint:
            raise BaseMismatchError("the adapter was trained on other base weights than those loaded")
        found, copies = _classify(file.keys(), expected)
        for key, (name, half) in found.items():
            _check_header(file, key, expected[name], spec.rank_of(name), half)
        for key in copies:
            _check_copy(file, key, base)
        return {f"{name}.lora_{half}": file.tensor(key) for key, (name, half) in found.items()}
    except (SafetensorError, OSError, MemoryError, ValueError, RuntimeError) as error:
        raise AdapterFormatError(f"{WEIGHTS_NAME}: {error}", check="safetensors") from None


def _classify(keys: Iterable[str], expected: Mapping[str, LinearShape]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Tell LoRA tensors (key -> module, "A"|"B") from copies of embeddings; anything else is refused."""
    found, copies, strangers = {}, [], []
    for key in keys:
        match = _LORA_KEY.fullmatch(key)
        if match and match[1] in expected:
            found[key] = (match[1], match[2])
        elif not match and key.startswith(_KEY_PREFIX) and key.endswith(".weight") and ".lora_" not in key:
            copies.append(key)
        else:
            strangers.append(key)
    if strangers:
        raise AdapterFormatError(
            f"tensors that belong to no adapted module of this base: {_some(strangers)}", check="match"
        )
    halves = set(found.values())
    missing = [f"{n}.lora_{h}" for n in expected for h in "AB" if (n, h) not in halves]
    if missing:
        raise AdapterFormatError(f"target modules without tensors: {_some(missing)}", check="match")
    return found, copies


def _check_header(file: TensorFile, key: str, shape: LinearShape, rank: int, half: str) -> None:
    want = [rank, shape.in_features] if half == "A" else [shape.out_features, rank]
    if list(file.shape(key)) != want:
        raise AdapterFormatError(f"{key} has shape {list(file.shape(key))}, expected {want}", check="shape")
    if file.dtype(key) not in _FLOAT_DTYPES:
        raise AdapterFormatError(f"{key} has dtype {file.dtype(key)}", check="dtype")


def _check_copy(file: TensorFile, key: str, base: BaseSignature) -> None:
    """PEFT saves the embeddings beside an lm_head adapter; they must be the base's own."""
    name = key.removeprefix(_KEY_PREFIX).replace(".base_layer.", ".")
    own = base.embeddings.get(name)
    if own is None:
        raise AdapterFormatError(f"{key} is no LoRA tensor", check="match")
    if list(file.shape(key)) != list(own.shape):
        raise BaseMismatchError(f"{key} has another shape than the base's embeddings")
    if not own.is_copied_by(file.tensor(key)):
        raise BaseMismatchError(f"{key} differs from the base's own: trained embeddings cannot be served")


def _pair(name: str, spec: LoraSpec, tensors: dict[str, torch.Tensor]) -> LoraPair:
    a, b = (tensors[f"{name}.lora_{half}"].to(torch.float32) for half in "AB")
    return LoraPair(a, b, spec.scaling_of(name))


def _check_finite(modules: Mapping[str, LoraPair]) -> None:
    """The largest magnitude of all tensors in one call; one by one only to name the culprit."""
    tensors = [tensor for pair in modules.values() for tensor in (pair.a, pair.b)]
    if isfinite(torch.nn.utils.get_total_norm(tensors, inf).item()):
        return
    for name, pair in modules.items():
        if not (torch.isfinite(pair.a).all() and torch.isfinite(pair.b).all()):
            raise AdapterFormatError(f"{name} has NaN or infinite weights", check="finite")


def _written_targets(spec: LoraSpec, weights: LoraWeights, base: BaseSignature) -> list[str]:
    if spec.target_modules != "all-linear":
        return sorted(spec.target_modules)
    suffixes = {name.rsplit(".", 1)[-1] for name in weights.modules}
    explicit = LoraSpec(target_modules=tuple(suffixes), layers_to_transform=spec.layers_to_transform)
    return sorted(suffixes if set(explicit.matching(base)) == set(weights.modules) else weights.modules)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
