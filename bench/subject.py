"""What is measured: a base of random weights and random adapters for it. Speed does not depend on their values.

Knows sizes and files, not what is done with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from adapters.lora_weights import BaseSignature, LoraPair, LoraSpec, LoraWeights
from service.engine.base_model import BaseModel, load_base_model

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Sizes:
    """The base's shape and the adapters' rank."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    r: int


CPU = Sizes(hidden=512, layers=8, ffn=1536, heads=8, kv_heads=8, vocabulary=8192, positions=1024, r=8)
CUDA = Sizes(hidden=4096, layers=32, ffn=14336, heads=32, kv_heads=8, vocabulary=128256, positions=2048, r=16)
"""Llama 3.1 8B's shape; positions only as far as the benchmark goes."""


@dataclass(frozen=True)
class Subject:
    """The loaded base, its checkpoint for peers and other processes, and adapters named "0", "1", ..."""

    directory: Path
    sizes: Sizes
    base: BaseModel
    adapters: Mapping[str, LoraWeights]

    @property
    def is_cuda(self) -> bool:
        return self.base.device.type == "cuda"


def prepare(directory: Path, sizes: Sizes, num_adapters: int) -> Subject:
    """Write the checkpoint and load it as the service does, in NF4 on the default device."""
    transformers_logging.disable_progress_bar()
    write_checkpoint(directory, sizes)
    base = load_base_model(str(directory), quantization="nf4", name="bench")
    adapters = {str(seed): random_adapter(sizes, base.signature, seed) for seed in range(num_adapters)}
    return Subject(directory, sizes, base, adapters)


def lora_spec(sizes: Sizes) -> LoraSpec:
    """All linear layers but the output head."""
    return LoraSpec(r=sizes.r, lora_alpha=2.0 * sizes.r)


def random_adapter(sizes: Sizes, base: BaseSignature, seed: int, spec: LoraSpec | None = None) -> LoraWeights:
    """Small normal weights in every module, so that no kernel meets a zero or an infinity it could skip."""
    spec = spec or lora_spec(sizes)
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.02

    modules = {}
    for name in spec.matching(base):
        shape = base.modules[name]
        a, b = normal(spec.r, shape.in_features), normal(shape.out_features, spec.r)
        modules[name] = LoraPair(a, b, spec.scaling_of(name))
    return LoraWeights(spec, modules)


def write_checkpoint(directory: Path, sizes: Sizes) -> None:
    """A random Llama in bfloat16, with a byte-level tokenizer whose every token stands for visible text."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.positions,
        tie_word_embeddings=False,
        pad_token_id=SPECIAL_TOKENS.index("<|pad|>"),
        bos_token_id=SPECIAL_TOKENS.index("<|bos|>"),
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"),
    )
    with torch.random.fork_rng(devices=[]), _default_dtype(torch.bfloat16):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    _tokenizer(sizes.vocabulary).save_pretrained(directory)


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Bytes encode to themselves; the rest of the vocabulary are words that only the model can write."""
    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = ("Ġ" + "".join(letters) for letters in product(ascii_lowercase, repeat=4))
    pieces += islice(words, max(0, size - len(pieces)))
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
