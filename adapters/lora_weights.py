"""What a LoRA is, in PEFT's words and in tensors, and what of a base it has to fit. Knows no file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from adapters.errors import AdapterFormatError


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
            missing = wanted - {layer_index(n) for n in base.modules}
            if missing:
                raise AdapterFormatError(
                    f"layers_to_transform names layer {min(missing)}, which the base lacks (it has 0 to"
                    f" {max((layer_index(n) or 0 for n in base.modules), default=0)})",
                    check="match",
                    param="layers_to_transform",
                )
            names = [n for n in names if layer_index(n) in wanted]
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


def _from_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first pattern that is the module's name (its end, unless `^` stands before it)."""
    for key, value in pattern.items():
        name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if module == name or (not key.startswith("^") and module.endswith("." + name)):
            return value
    return default


def layer_index(module: str) -> int | None:
    match = re.search(r"\.(\d+)\.", module)
    return int(match[1]) if match else None
