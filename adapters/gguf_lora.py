"""A LoRA adapter as a GGUF file for llama.cpp. Knows its names and layout, not who asks.

llama.cpp adds `scale * B (A x)` with scale = alpha / rank, one alpha for the file; a module whose scaling is another
has the difference multiplied into its B. For Llama and Mistral it stores the rows of q and k so that the halves of a
head that rotate together lie side by side, so the rows of their B go the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from adapters.errors import AdapterFormatError
from adapters.lora_weights import LoraWeights

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""transformers' `model_type` -> llama.cpp's architecture, where tensors are only renamed or, for q and k, reordered."""


def write_gguf(path: Path, weights: LoraWeights, config: Mapping[str, Any], *, name: str) -> None:
    """Write `weights` for a base with this (transformers) config.

    Raises:
        AdapterFormatError: check "gguf": an architecture or a module that this does not cover.
    """
    arch = ARCHITECTURES.get(str(config.get("model_type")))
    if arch is None:
        raise AdapterFormatError(
            f"a GGUF can be written for bases of the types {', '.join(ARCHITECTURES)}, not"
            f" {config.get('model_type')!r}; export the PEFT directory (format=zip) and convert it with llama.cpp",
            check="gguf",
            param="format",
        )
    names = gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, weights.spec.lora_alpha)
        writer.add_string(gguf.Keys.General.NAME, name)
        for module, (a, b, scaling) in weights.modules.items():
            target = _target(names, module, config)
            b = b * (scaling * a.shape[0] / weights.spec.lora_alpha)
            if arch is gguf.MODEL_ARCH.LLAMA and module.endswith((".q_proj", ".k_proj")):
                b = interleaved(b, _num_heads(module, config))
            writer.add_tensor(f"{target}.lora_a", _plain(a))
            writer.add_tensor(f"{target}.lora_b", _plain(b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def interleaved(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Of each head's [first half, second half] rows: first of the one, first of the other, second of the one, …"""
    halves = rows.view(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _target(names: gguf.TensorNameMap, module: str, config: Mapping[str, Any]) -> str:
    target = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
    if target is None or (target == "output.weight" and config.get("tie_word_embeddings")):
        raise AdapterFormatError(
            f"llama.cpp has no tensor of its own for {module}, so this adapter cannot be a GGUF; use format=zip",
            check="gguf",
            param="format",
        )
    return target


def _num_heads(module: str, config: Mapping[str, Any]) -> int:
    num_heads = int(config["num_attention_heads"])
    return num_heads if module.endswith(".q_proj") else int(config.get("num_key_value_heads") or num_heads)


def _plain(tensor: torch.Tensor) -> NDArray[np.float32]:
    return tensor.to(torch.float32).contiguous().numpy()
