"""PEFT's LoRA directories, read with every check and written so that plain PEFT loads them.

A directory is `adapter_config.json` + `adapter_model.safetensors` (PEFT 0.5 and later). Knows the shape of the
base model (`BaseSignature`), not the base itself, and nothing of slots or stores.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from adapters.errors import AdapterFormatError, BaseMismatchError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_KEY_PREFIX = "base_model.model."
_PATTERN_KEY = re.compile(r"\^?(?:\\\.|[\w.-])+\$?")
"""A module's name or its end. PEFT takes any regular expression here, but one that comes from outside may never end."""

_LORA_KEY = re.compile(re.escape(_KEY_PREFIX) + r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_FLOAT_DTYPES = {"F32", "F16", "BF16", "F64"}

WHY_NO_DORA = (
    "DoRA rescales the base's own output by the norm of W + B A, row by row; here the base's product is shared by all"
    " adapters of a batch, so a DoRA adapter would be served wrongly. Use plain LoRA or use_rslora"
)

# PEFT options that would change what the tensors mean. A value in the tuple is harmless; any other is refused.
_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_bdlora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, {}, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "exclude_modules": (None, []),
}

# Initialisations that leave the base as it was. The others (PiSSA, OLoRA, CorDA, LoftQ, …) change the base's weights:
# what they learned fits no unchanged base, unless PEFT converted it on saving, which sets this to true.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

# What else PEFT writes, that changes nothing once an adapter is trained.
_READ_OR_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


class LinearShape(NamedTuple):
    """Sizes of one linear layer of the base: weight is [out_features, in_features]."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class TensorIdentity:
    """A tensor of the base by its content, so that a copy can be told without the tensor itself."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sha256: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorIdentity:
        return cls(tuple(tensor.shape), tensor.dtype, _sha256(tensor))

    def is_copied_by(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor`, rounded to this one's dtype, has the same values."""
        return tuple(tensor.shape) == self.shape and _sha256(tensor.to(self.dtype)) == self.sha256


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


@dataclass(frozen=True)
class BaseSignature:
    """What an adapter has to fit: module names with their shapes, the base's names and its fingerprint.

    `names` are those that `base_model_name_or_path` may end in. `embeddings` identifies the base's own input and
    output embedding weights by name: PEFT saves copies of them beside an `lm_head` adapter.
    """

    modules: Mapping[str, LinearShape]
    fingerprint: str
    names: frozenset[str] = frozenset()
    head: str | None = None
    embeddings: Mapping[str, TensorIdentity] = field(default_factory=dict)


class LoraPair(NamedTuple):
    """One module's update: `y += (x @ a.T) @ b.T * scaling`; a: [r, in_features], b: [out_features, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class LoraSpec:
    """The choice of a LoRA, in PEFT's words. `target_modules="all-linear"` leaves the output head alone."""

    r: int = 16
    lora_alpha: float = 32.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    use_rslora: bool = False
    lora_dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None

    def matching(self, base: BaseSignature) -> list[str]:
        """Modules of the base that this spec adapts, in the base's order.

        Raises:
            AdapterFormatError: a target matches no module (check `match`): it would be a silent no-op.
        """
        if self.target_modules == "all-linear":
            targets: tuple[str, ...] | None = None
            names = [name for name in base.modules if name != base.head]
        else:
            targets = self.target_modules
            names = [n for n in base.modules if any(n == t or n.endswith("." + t) for t in targets)]
            for target in targets:
                if not any(n == target or n.endswith("." + target) for n in names):
                    known = sorted({n.rsplit(".", 1)[-1] for n in base.modules})
                    raise AdapterFormatError(
                        f"target_modules names {target!r}, which matches no linear layer of the base"
                        f" (it has {', '.join(known)})",
                        check="match",
                        param="target_modules",
                    )
        if self.layers_to_transform is not None:
            wanted = set(self.layers_to_transform)
            missing = wanted - {_layer_index(n) for n in base.modules}
            if missing:
                raise AdapterFormatError(
                    f"layers_to_transform names layer {min(missing)}, which the base lacks (it has 0 to"
                    f" {max((_layer_index(n) or 0 for n in base.modules), default=0)})",
                    check="match",
                    param="layers_to_transform",
                )
            names = [n for n in names if _layer_index(n) in wanted]
        if not names:
            raise AdapterFormatError("no layer of the base is adapted", check="match", param="target_modules")
        return names

    def rank_of(self, module: str) -> int:
        return int(_from_pattern(self.rank_pattern, module, self.r))

    def scaling_of(self, module: str) -> float:
        alpha = float(_from_pattern(self.alpha_pattern, module, self.lora_alpha))
        rank = self.rank_of(module)
        return alpha / rank**0.5 if self.use_rslora else alpha / rank


@dataclass(frozen=True)
class LoraWeights:
    """One adapter in host memory."""

    spec: LoraSpec
    modules: Mapping[str, LoraPair]

    @property
    def max_rank(self) -> int:
        return max(pair.a.shape[0] for pair in self.modules.values())


def read_adapter(directory: Path, base: BaseSignature, *, max_rank: int) -> LoraWeights:
    """Read a PEFT LoRA directory for this base.

    Raises:
        AdapterFormatError: `check` names what failed: files, pickle, config, unsupported, rank, base,
            safetensors, match, shape, dtype, finite.
    """
    spec = _read_config(directory, base, max_rank)
    expected = {name: base.modules[name] for name in spec.matching(base)}
    tensors = _read_tensors(directory / WEIGHTS_NAME, base, expected, spec)
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
    with safe_open(directory / WEIGHTS_NAME, framework="pt") as file:
        if (file.metadata() or {}).get("base_fingerprint"):
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


def _read_config(directory: Path, base: BaseSignature, max_rank: int) -> LoraSpec:
    if not (directory / CONFIG_NAME).is_file():
        raise AdapterFormatError(f"{CONFIG_NAME} is missing", check="files")
    if not (directory / WEIGHTS_NAME).is_file():
        if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pkl")):
            raise AdapterFormatError("pickled weights are refused; save as safetensors", check="pickle")
        raise AdapterFormatError(f"{WEIGHTS_NAME} is missing", check="files")
    try:
        config = json.loads((directory / CONFIG_NAME).read_text())
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{CONFIG_NAME} is not JSON: {error}", check="config") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterFormatError("peft_type must be 'LORA'", check="config")
    if config.get("auto_mapping"):
        config.pop("auto_mapping")  # a class name for PEFT's auto models; nothing is imported from it here
    for option, harmless in _ONLY_SUPPORTED.items():
        if option in config and config[option] not in harmless:
            if option == "use_dora":
                raise AdapterFormatError(f"use_dora: {WHY_NO_DORA}", check="unsupported")
            raise AdapterFormatError(f"{option}={_shown(config[option])} is not supported", check="unsupported")
    if config.get("init_lora_weights") not in _HARMLESS_INITS:
        raise AdapterFormatError(
            f"init_lora_weights={_shown(config['init_lora_weights'])} changes the base; save the adapter converted to a"
            " plain LoRA (PEFT: path_initial_model_for_weight_conversion)",
            check="unsupported",
        )
    for option in config.keys() - _ONLY_SUPPORTED.keys() - _READ_OR_HARMLESS:
        if config[option] not in (None, False, [], {}, ""):
            raise AdapterFormatError(f"{option}={_shown(config[option])} is not known here", check="unsupported")
    _check_layers_pattern(config.get("layers_pattern"), base)
    _check_base_name(config.get("base_model_name_or_path"), base)
    return _spec_from_config(config, max_rank)


def _check_layers_pattern(patterns: Any, base: BaseSignature) -> None:
    """PEFT's `layers_pattern` says which list `layers_to_transform` counts; here it is always the outermost."""
    names = [patterns] if isinstance(patterns, str) else patterns or []
    indexed = [name for name in base.modules if _layer_index(name) is not None]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterFormatError("layers_pattern is malformed", check="config")
    if names and not all(any(re.match(rf"([^.]+\.)*?{re.escape(n)}\.\d+\.", m) for n in names) for m in indexed):
        raise AdapterFormatError(f"layers_pattern={patterns!r} is not the base's list of layers", check="unsupported")


def _check_base_name(named: Any, base: BaseSignature) -> None:
    if not named or not base.names:
        return
    if not isinstance(named, str):
        raise AdapterFormatError("base_model_name_or_path is not a string", check="config")
    if named in base.names or re.split(r"[/\\]", named.rstrip("/\\"))[-1] in base.names:
        return
    raise BaseMismatchError(f"the adapter was made for base {named!r}; loaded is {' = '.join(sorted(base.names))}")


def _spec_from_config(config: dict[str, Any], max_rank: int) -> LoraSpec:
    targets = config.get("target_modules")
    layers = config.get("layers_to_transform")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    well_formed = (
        _is_int(config.get("r"))
        and _is_number(config.get("lora_alpha", 8))
        and _is_number(config.get("lora_dropout") or 0.0)
        and (isinstance(targets, str) or _is_list_of(targets, str))
        and (layers is None or _is_int(layers) or _is_list_of(layers, int))
        and isinstance(ranks, dict)
        and all(_is_int(v) for v in ranks.values())
        and isinstance(alphas, dict)
        and all(_is_number(v) for v in alphas.values())
    )
    if not well_formed:
        raise AdapterFormatError(
            "r, lora_alpha, target_modules, rank_pattern or alpha_pattern is malformed", check="config"
        )
    for key in (*ranks, *alphas):
        if not _PATTERN_KEY.fullmatch(key):
            raise AdapterFormatError(
                f"the pattern {_shown(key)}: only names of modules are taken, not regular expressions",
                check="unsupported",
            )
    for rank in (config["r"], *ranks.values()):
        if not 1 <= rank <= max_rank:
            raise AdapterFormatError(f"rank {rank} is outside 1..{max_rank}", check="rank")
    if isinstance(targets, str) and targets != "all-linear":
        raise AdapterFormatError(f"target_modules as a regular expression ({_shown(targets)})", check="unsupported")
    return LoraSpec(
        r=config["r"],
        lora_alpha=config.get("lora_alpha", 8),
        target_modules="all-linear" if isinstance(targets, str) else tuple(sorted(targets or ())),
        use_rslora=bool(config.get("use_rslora", False)),
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        layers_to_transform=None
        if layers is None
        else tuple(sorted({layers} if isinstance(layers, int) else {*layers})),
    )


def _read_tensors(
    path: Path, base: BaseSignature, expected: Mapping[str, LinearShape], spec: LoraSpec
) -> dict[str, torch.Tensor]:
    """All LoRA tensors by `module.lora_A|B`. Shapes are checked on the header, before any byte is read."""
    try:
        with safe_open(path, framework="pt") as file:
            fingerprint = (file.metadata() or {}).get("base_fingerprint")
            if fingerprint is not None and fingerprint != base.fingerprint:
                raise BaseMismatchError("the adapter was trained on other base weights than those loaded")
            found, copies = _classify(file.keys(), expected)
            for key, (name, half) in found.items():
                _check_header(file.get_slice(key), key, expected[name], spec.rank_of(name), half)
            for key in copies:
                _check_copy(file, key, base)
            return {f"{name}.lora_{half}": file.get_tensor(key) for key, (name, half) in found.items()}
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


def _check_header(view: Any, key: str, shape: LinearShape, rank: int, half: str) -> None:
    want = [rank, shape.in_features] if half == "A" else [shape.out_features, rank]
    if list(view.get_shape()) != want:
        raise AdapterFormatError(f"{key} has shape {list(view.get_shape())}, expected {want}", check="shape")
    if view.get_dtype() not in _FLOAT_DTYPES:
        raise AdapterFormatError(f"{key} has dtype {view.get_dtype()}", check="dtype")


def _check_copy(file: Any, key: str, base: BaseSignature) -> None:
    """PEFT saves the embeddings beside an lm_head adapter; they must be the base's own."""
    name = key.removeprefix(_KEY_PREFIX).replace(".base_layer.", ".")
    own = base.embeddings.get(name)
    if own is None:
        raise AdapterFormatError(f"{key} is no LoRA tensor", check="match")
    if list(file.get_slice(key).get_shape()) != list(own.shape):
        raise BaseMismatchError(f"{key} has another shape than the base's embeddings")
    if not own.is_copied_by(file.get_tensor(key)):
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


def _from_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first pattern that is the module's name (its end, unless `^` stands before it)."""
    for key, value in pattern.items():
        name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if module == name or (not key.startswith("^") and module.endswith("." + name)):
            return value
    return default


def _layer_index(module: str) -> int | None:
    match = re.search(r"\.(\d+)\.", module)
    return int(match[1]) if match else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, kind) for v in value)
