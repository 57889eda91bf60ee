"""Writes base + adapter as one plain model that transformers loads. Knows the base and files, no jobs and no HTTP.

The update is added to what the base holds, dequantized, and rounded to the base's dtype. Only reads the base: its
weights, its sites and whoever is served by them stay as they are. One file's worth of weights is in memory at a time.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D

from adapters.errors import AdapterFormatError
from adapters.lora_weights import LoraWeights
from service.engine.base_model import BaseModel

MAX_SHARD_BYTES = 1024**3

README = """# {model}

`{base}` with the adapter `{digest}` added to its weights.

The adapter was trained and is served beside a base held as {quantization}; these weights are that base's, dequantized,
plus the adapter, rounded to {dtype}. So answers differ slightly from the served ones: rounding lost {lost:.2%} of the
update (as a share of its norm).
"""


@dataclass(frozen=True)
class MergeReport:
    """`update_error`: the norm of what rounding changed, as a share of the norm of all that the adapter adds."""

    dtype: str
    quantization: str
    num_tensors: int
    bytes: int
    update_error: float


@dataclass
class _Rounding:
    lost: float = 0.0
    added: float = 0.0


def write_merged(
    base: BaseModel,
    weights: LoraWeights,
    directory: Path,
    *,
    model: str,
    digest: str,
    between_tensors: Callable[[], None] = lambda: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> MergeReport:
    """config.json, safetensors and the tokenizer into `directory`, an existing empty one.

    Raises:
        AdapterFormatError: check "merge": transformers renames this architecture's weights while loading.
    """
    config = copy.deepcopy(base.model.config)
    if get_checkpoint_conversion_mapping(config.model_type):  # type: ignore[no-untyped-call]
        raise AdapterFormatError(f"models of the type {config.model_type} cannot be merged here yet", check="merge")
    untied = base.signature.head in weights.modules
    if untied:
        config.tie_word_embeddings = False  # the head learned something that the input embedding did not
    config.dtype = base.dtype
    with torch.device("meta"):
        skeleton: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    tied = {} if not config.tie_word_embeddings else getattr(skeleton, "_tied_weights_keys", None) or {}
    names = [name for name in shapes if name not in tied]
    rounding, num_bytes = _Rounding(), 0
    others = dict(base.model.state_dict())
    shards = _plan(names, shapes, base.dtype.itemsize, max_shard_bytes)
    for file, held in shards.items():
        tensors = {}
        for name in held:
            tensors[name] = _merged(base, weights, skeleton, others, name, rounding).contiguous()
            assert tensors[name].shape == shapes[name], name
            num_bytes += tensors[name].nbytes
            between_tensors()
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": num_bytes},
            "weight_map": {n: f for f, held in shards.items() for n in held},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    _write_rest(base, config, directory)
    error = (rounding.lost / rounding.added) ** 0.5 if rounding.added else 0.0
    dtype, held_as = str(base.dtype).removeprefix("torch."), base.quantization.value
    (directory / "README.md").write_text(
        README.format(model=model, base=base.name, digest=digest, quantization=held_as, dtype=dtype, lost=error)
    )
    return MergeReport(dtype, held_as, len(names), num_bytes, error)


def _merged(
    base: BaseModel,
    weights: LoraWeights,
    skeleton: nn.Module,
    others: Mapping[str, torch.Tensor],
    name: str,
    rounding: _Rounding,
) -> torch.Tensor:
    """One tensor of the merged model, in host memory."""
    module, _, kind = name.rpartition(".")
    site = base.lora_sites.get(module)
    if site is None:
        tensor = others[name].detach()
        return (tensor.to(base.dtype) if tensor.is_floating_point() else tensor).to("cpu", copy=True)
    (span,) = (span for part, span in zip(site.parts, site.spans, strict=True) if part.name == module)
    frozen: Any = site.base
    if kind == "bias":
        bias: torch.Tensor = frozen.bias[slice(*span)]
        return bias.detach().to("cpu", base.dtype, copy=True)
    weight: torch.Tensor = frozen.dequantized()[slice(*span)].detach().to(torch.float32)
    pair = weights.modules.get(module)
    if pair is not None:
        update = (pair.b.to(weight.device) @ pair.a.to(weight.device)) * pair.scaling
        exact = weight + update
        rounding.lost += float((exact.to(base.dtype).to(torch.float32) - exact).square().sum())
        rounding.added += float(update.square().sum())
        weight = exact
    merged = weight.to("cpu", base.dtype, copy=True)
    return merged.T if isinstance(skeleton.get_submodule(module), Conv1D) else merged


def _plan(names: list[str], shapes: Mapping[str, torch.Size], itemsize: int, limit: int) -> dict[str, list[str]]:
    """File -> tensors, none longer than `limit` but for a single tensor; in transformers' names."""
    parts = list(_cut(names, shapes, itemsize, limit))
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}


def _cut(names: list[str], shapes: Mapping[str, torch.Size], itemsize: int, limit: int) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for name in names:
        num_bytes = shapes[name].numel() * itemsize
        if part and size + num_bytes > limit:
            yield part
            part, size = [], 0
        part.append(name)
        size += num_bytes
    yield part


def _write_rest(base: BaseModel, config: Any, directory: Path) -> None:
    config.architectures = [type(base.model).__name__]
    config.save_pretrained(directory)
    generation = getattr(base.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)
