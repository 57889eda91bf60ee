"""A tiny grafted base for the tests of what learns: dense fp32, siblings fused, made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from adapters.lora import LoraPart, graft
from adapters.lora_weights import BaseSignature, LinearShape
from service.engine.attention import register_attention

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class TemplateCodec:
    """The test tokenizer under a chat template of one's choice."""

    def __init__(self, directory: Path, template: str = CHATML) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.template = template

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset([self.tokenizer.eos_token_id])

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, add_generation_prompt: bool = True
    ) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self.template,
        )
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


@dataclass(frozen=True)
class GraftedBase:
    model: LlamaForCausalLM
    signature: BaseSignature


@pytest.fixture(scope="session")
def codec(tiny_llama_dir: Path) -> TemplateCodec:
    return TemplateCodec(tiny_llama_dir)


@pytest.fixture(scope="session")
def grafted(tiny_llama_dir: Path) -> GraftedBase:
    """Every test of the session shares it: nothing may change it."""
    return graft_base(tiny_llama_dir)


def graft_base(directory: Path) -> GraftedBase:
    model = LlamaForCausalLM.from_pretrained(directory, attn_implementation=register_attention())
    model.eval().requires_grad_(False)
    shapes = {
        name: LinearShape(module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    groups = [["lm_head"]]
    for index in range(model.config.num_hidden_layers):
        layer = f"model.layers.{index}"
        groups.append([f"{layer}.self_attn.{part}_proj" for part in "qkv"])
        groups.append([f"{layer}.mlp.{part}_proj" for part in ("gate", "up")])
        groups += [[f"{layer}.self_attn.o_proj"], [f"{layer}.mlp.down_proj"]]
    sites = [
        (
            _fused([model.get_submodule(name) for name in names]),
            [LoraPart(name, shapes[name].out_features) for name in names],
            shapes[names[0]].in_features,
        )
        for names in groups
    ]
    graft(model, sites, head="lm_head")
    return GraftedBase(model, BaseSignature(shapes, fingerprint="tiny", head="lm_head"))


def _fused(linears: Sequence[nn.Module]) -> nn.Linear:
    weight = torch.cat([linear.weight for linear in linears])  # type: ignore[misc]
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    fused.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return fused
