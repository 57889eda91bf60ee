"""Adapters that say who they are: a base and LoRAs for it whose greedy answer is the adapter's own name.

Half of them speak through the output head: the answer spells a word of four tokens, over and over. The others speak
through the *cache*: they add a direction to every token's value vector, and the base reads it as one token, repeated.
So a wrong slot, a wrong table of one layer, or keys and values that somebody else computed answer with a wrong name.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from adapters.lora_weights import LoraPair, LoraSpec, LoraWeights
from service.engine.base_model import BaseModel
from tests.adapters.loras import random_lora

PROMPT_TOKENS = range(72, 200)
_CACHE_TOKENS = range(10, 72)
_WORD_TOKENS = range(200, 512)
_HEAD_DIM = 32
_CODE = 0.3
_CONSTANT = 3.0
EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@dataclass(frozen=True)
class Canary:
    weights: LoraWeights
    name: tuple[int, ...]

    def says(self, tokens: list[int]) -> bool:
        """Whether this is the beginning of what the adapter always answers."""
        return all(token == self.name[place % len(self.name)] for place, token in enumerate(tokens))


def write_canary_base(tiny_llama: Path, directory: Path) -> None:
    """The tiny Llama with one hidden dimension that is always the same, and a first layer that passes values on."""
    model: Any = LlamaForCausalLM.from_pretrained(tiny_llama)
    generator = torch.Generator().manual_seed(1)
    hidden = model.config.hidden_size
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(torch.randn(embedding.shape, generator=generator) * _CODE)
        embedding[:, 0] = _CONSTANT
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight.zero_()
        attention.o_proj.weight.copy_(torch.eye(hidden))
        head = model.get_output_embeddings().weight
        head.mul_(0.2)
        for index, token in enumerate(_CACHE_TOKENS):
            for place in _read_at(index):
                head[token, place] = 1.0
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(directory)


class Canaries:
    """Makes one after the other, each with another name; every second speaks through the cache while names last."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base.signature
        embedding: Any = base.model.get_input_embeddings()
        self._embedding: torch.Tensor = embedding.weight.detach().float()
        self._rng = random.Random(3)
        self._cache_names = list(range(len(_CACHE_TOKENS)))
        self._words: set[tuple[int, ...]] = set()
        self._num_made = 0

    def make(self) -> Canary:
        self._num_made += 1
        rank = self._rng.choice([5, 8, 8, 12, 16])
        spec = LoraSpec(r=rank, lora_alpha=self._rng.choice([8, 16]), target_modules=EVERYWHERE)
        weights = random_lora(self._base, seed=self._num_made, spec=spec, size=0.02)
        if self._num_made % 2 and self._cache_names:
            return self._through_cache(weights, self._cache_names.pop())
        return self._through_head(weights)

    def _through_cache(self, weights: LoraWeights, index: int) -> Canary:
        name = "model.layers.0.self_attn.v_proj"
        pair = weights.modules[name]
        a, b = torch.zeros_like(pair.a), torch.zeros_like(pair.b)
        a[0, 0] = 1.0
        b[_value_of(index), 0] = 1.0 / pair.scaling
        return Canary(_with(weights, name, a, b), (_CACHE_TOKENS[index],))

    def _through_head(self, weights: LoraWeights) -> Canary:
        word = tuple(self._rng.sample(_WORD_TOKENS, 4))
        while word in self._words:
            word = tuple(self._rng.sample(_WORD_TOKENS, 4))
        self._words.add(word)
        pair = weights.modules["lm_head"]
        a, b = torch.zeros_like(pair.a), torch.zeros_like(pair.b)
        a[0, 0] = 1.0
        b[word[0], 0] = 2.0 / pair.scaling
        for place, (token, following) in enumerate(pairwise(word), start=1):
            code = self._embedding[token].clone()
            code[0] = 0.0
            a[place] = code / code.norm()
            b[following, place] = 3.0 / pair.scaling
        return Canary(_with(weights, "lm_head", a, b), word)


def _with(weights: LoraWeights, name: str, a: torch.Tensor, b: torch.Tensor) -> LoraWeights:
    pair = weights.modules[name]
    return LoraWeights(weights.spec, {**weights.modules, name: LoraPair(a, b, pair.scaling)})


def _value_of(index: int) -> int:
    """The dimension of the value vector (two KV heads) that stands for a name; the first of each is left alone."""
    return index // 31 * _HEAD_DIM + 1 + index % 31


def _read_at(index: int) -> tuple[int, int]:
    """Where that dimension arrives in the hidden state: two query heads share a KV head."""
    first = index // 31 * 2 * _HEAD_DIM + 1 + index % 31
    return first, first + _HEAD_DIM
