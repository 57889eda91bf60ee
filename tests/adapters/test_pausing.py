"""Pauses of training: where they are, and that they leave the result alone."""

from __future__ import annotations

import torch

from adapters.corpus import build_corpus
from adapters.example import ChatExample, Message
from adapters.lora import BatchedLoraLinear
from adapters.lora_weights import LoraSpec
from adapters.pausing import pausing
from adapters.recipe import TrainConfig
from adapters.trainable import TrainableLora
from adapters.trainer import Trainer
from tests.adapters.conftest import GraftedBase, TemplateCodec

SPEC = LoraSpec(r=4, lora_alpha=8)
CONFIG = TrainConfig(num_epochs=1, batch_size=4, learning_rate=5e-3, seed=7, eval_every=100)


def _trainer(base: GraftedBase, codec: TemplateCodec) -> Trainer:
    messages = (Message("user", "which tree?"), Message("assistant", "a medlar tree", trained=True))
    corpus = build_corpus([ChatExample(line, messages) for line in range(1, 9)], codec, max_length=128)
    adapter = TrainableLora(SPEC, base.signature, seed=7, device=torch.device("cpu"))
    return Trainer(base.model, adapter, corpus, corpus, CONFIG)


def test_a_step_pauses_at_every_site_forward_and_backward_and_ends_in_the_same_bits(
    grafted: GraftedBase, codec: TemplateCodec
) -> None:
    plain, paused = _trainer(grafted, codec), _trainer(grafted, codec)
    pauses: list[int] = []
    plain.step()
    with pausing(lambda: pauses.append(1)):
        paused.step()
    sites = [module for module in grafted.model.modules() if isinstance(module, BatchedLoraLinear)]
    adapted = [site for site in sites if any(part.name in paused.adapter.a for part in site.parts)]
    assert adapted and len(pauses) == len(sites) + len(adapted)
    for left, right in zip(plain.adapter.parameters(), paused.adapter.parameters(), strict=True):
        assert torch.equal(left, right)


def test_scoring_pauses_as_well_and_nothing_pauses_outside_the_block(
    grafted: GraftedBase, codec: TemplateCodec
) -> None:
    trainer = _trainer(grafted, codec)
    pauses: list[int] = []
    with pausing(lambda: pauses.append(1)):
        trainer.evaluate()
    assert pauses
    num_pauses = len(pauses)
    trainer.step()
    assert len(pauses) == num_pauses
