"""Small corpora and trainers for the tests of what learns."""

from __future__ import annotations

import torch

from adapters.corpus import Corpus, build_corpus
from adapters.example import ChatExample, Message, PreferenceExample
from adapters.lora_weights import LoraSpec
from adapters.recipe import TrainConfig
from adapters.shared_forward import SharedForward
from adapters.trainable import TrainableLora
from adapters.trainer import Trainer
from tests.adapters.conftest import GraftedBase, TemplateCodec

CONFIG = TrainConfig(num_epochs=3, batch_size=4, learning_rate=5e-3, seed=7, eval_every=4, max_slice_tokens=128)
SPEC = LoraSpec(r=4, lora_alpha=8)


def chats(codec: TemplateCodec, count: int = 20, seed: int = 0) -> Corpus:
    """Short chats of very different lengths."""
    examples = [
        ChatExample(line, (Message("user", prompt), Message("assistant", " ".join(["tree"] * number), trained=True)))
        for line, (prompt, number) in enumerate(_prompts(count, seed), start=1)
    ]
    return build_corpus(examples, codec, max_length=256)


def pairs(codec: TemplateCodec, count: int = 20, seed: int = 0) -> Corpus:
    """The same prompts: trees are preferred to longer or shorter rows of rocks."""
    examples = [
        PreferenceExample(line, (Message("user", prompt),), " ".join(["tree"] * number), "rock " * (line % 4 + 1))
        for line, (prompt, number) in enumerate(_prompts(count, seed), start=1)
    ]
    return build_corpus(examples, codec, max_length=256)


def make_trainer(
    base: GraftedBase,
    train: Corpus,
    valid: Corpus,
    config: TrainConfig = CONFIG,
    spec: LoraSpec = SPEC,
    shared: SharedForward | None = None,
) -> Trainer:
    adapter = TrainableLora(spec, base.signature, seed=config.seed, device=torch.device("cpu"))
    return Trainer(base.model, adapter, train, valid, config, shared)


def run(trainer: Trainer, num_steps: int) -> None:
    for _ in range(num_steps):
        trainer.step()
        if trainer.evaluation_due:
            trainer.evaluate()


def bits(trainer: Trainer) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in trainer.adapter.parameters()]


def _prompts(count: int, seed: int) -> list[tuple[str, int]]:
    numbers = torch.randint(1, 12, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        (f"say {number} {'very ' * (number * (line % 3))}often", number) for line, number in enumerate(numbers, start=1)
    ]
