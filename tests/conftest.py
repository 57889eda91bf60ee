"""Fixtures every package's tests share: quiet offline libraries, few threads, a tiny random Llama on disk."""

from __future__ import annotations

import os

# Before the first import of torch, numba or transformers: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # with more, a kernel's call gives its thread's torch as many
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton: its kernels then run on the CPU

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)

SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = [
    "When a request arrives, the scheduler decides which sequences run next and which of them wait.",
    "Training never changes a weight of the base; only the adapters learn, and each keeps to its own slot.",
    "Please translate, summarise or classify the following sentence, then answer with a single word.",
    "The graft takes where the cambium of scion and stock meet; the rootstock feeds them both.",
    "A tree keeps one root and bears many fruits: apples, quinces, pears, and a stubborn medlar.",
    "user: How many adapters are resident? assistant: Thirty-two, and one of them is training.",
    "Numbers such as 0123456789, signs such as {}[]():,.;!?\"'<>|/\\ and the odd naïve café → 🌱.",
]


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved two-layer random Llama with a chat template: hidden 128, 4 heads over 2 KV heads, FFN 192.

    Every in_features is a multiple of 64, so it quantizes to NF4. Byte-level BPE: any text round-trips.
    The same seed always, so the weights are the same in every run. Read only: copy before changing it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # xdist's controller reads this file and needs none of it

    directory = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = _byte_level_tokenizer()
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=SPECIAL_TOKENS.index("<|bos|>"),
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"),
        pad_token_id=SPECIAL_TOKENS.index("<|pad|>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(20)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return directory


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not look at these million objects again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
