"""GGUF adapters: read back by gguf's own reader, and the same effect under llama.cpp's arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from adapters.errors import AdapterFormatError
from adapters.gguf_lora import interleaved, write_gguf
from adapters.lora_weights import BaseSignature, LoraSpec
from tests.adapters.conftest import GraftedBase
from tests.adapters.loras import random_lora

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SPECS = [
    LoraSpec(r=4, lora_alpha=8),
    LoraSpec(r=4, lora_alpha=8, use_rslora=True, target_modules=("q_proj", "v_proj")),
    LoraSpec(r=4, lora_alpha=8, rank_pattern={"k_proj": 6}, alpha_pattern={"o_proj": 20.0}),
]


@pytest.fixture(scope="module")
def config(tiny_llama_dir: Path) -> dict[str, Any]:
    return dict(AutoConfig.from_pretrained(tiny_llama_dir).to_dict())


@pytest.fixture
def signature(grafted: GraftedBase) -> BaseSignature:
    return grafted.signature


@pytest.mark.parametrize("spec", SPECS)
def test_the_file_holds_every_tensor_under_llama_cpps_names_with_the_same_effect(
    spec: LoraSpec, tmp_path: Path, signature: BaseSignature, config: dict[str, Any]
) -> None:
    weights = random_lora(signature, seed=5, spec=spec)
    write_gguf(tmp_path / "a.gguf", weights, config, name="ft:tiny")
    reader = GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.architecture"], fields["general.type"]) == ("llama", "adapter")
    assert (fields["adapter.type"], fields["adapter.lora.alpha"]) == ("lora", 8.0)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == 2 * len(weights.modules)
    for module, pair in weights.modules.items():
        layer, _, part = module.removeprefix("model.layers.").partition(".")
        name = f"blk.{layer}.{NAMES[part]}.weight"
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        theirs = b @ a * (fields["adapter.lora.alpha"] / a.shape[0])  # as llama.cpp adds it
        ours = pair.b @ pair.a * pair.scaling
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            ours = interleaved(ours, config["num_attention_heads" if "q_proj" in part else "num_key_value_heads"])
        torch.testing.assert_close(theirs, ours)


def test_rows_of_q_and_k_go_where_llama_cpps_rotation_expects_them() -> None:
    """llama.cpp rotates neighbours (2i, 2i+1); transformers rotates (i, i + half). Both must see the same angle."""
    num_heads, size = 2, 8
    config = LlamaConfig(hidden_size=num_heads * size, num_attention_heads=num_heads)
    x = torch.randn(1, 5, num_heads * size, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(5)[None] + 3
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    heads = x.view(1, 5, num_heads, size).transpose(1, 2)
    rotated, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    expected = torch.stack([interleaved(row, num_heads) for row in rotated.transpose(1, 2).reshape(5, -1)])
    mine = torch.stack([interleaved(row, num_heads) for row in x[0]]).view(5, num_heads, size // 2, 2)
    angles = positions[0][:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    c, s = angles.cos()[:, None], angles.sin()[:, None]
    pairs = torch.stack((mine[..., 0] * c - mine[..., 1] * s, mine[..., 0] * s + mine[..., 1] * c), dim=-1)
    torch.testing.assert_close(pairs.reshape(5, -1), expected)


def test_what_llama_cpp_could_not_use_is_refused_by_name(
    tmp_path: Path, signature: BaseSignature, config: dict[str, Any]
) -> None:
    head = random_lora(signature, seed=1, spec=LoraSpec(r=2, target_modules=("lm_head",)))
    with pytest.raises(AdapterFormatError, match="lm_head"):
        write_gguf(tmp_path / "a.gguf", head, {**config, "tie_word_embeddings": True}, name="a")
    with pytest.raises(AdapterFormatError, match="gpt2"):
        write_gguf(tmp_path / "b.gguf", head, {**config, "model_type": "gpt2"}, name="b")
