"""The trainer and plain PEFT + torch's AdamW are the same run: same data, same order, same start, step by step.

`pytest -s tests/adapters/test_parity.py` prints the largest differences.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from adapters.corpus import Corpus
from adapters.lora_weights import LoraSpec
from adapters.recipe import Schedule, TrainConfig
from adapters.trainable import TrainableLora
from adapters.trainer import Trainer
from service.engine.base_model import load_base_model
from tests.adapters.conftest import GraftedBase, TemplateCodec
from tests.adapters.corpora import CONFIG, SPEC, chats, make_trainer
from tests.adapters.peft_reference import PeftReference

NUM_STEPS = 12


def _compare(trainer: Trainer, model: Any, what: str) -> tuple[float, float]:
    """Largest differences of a step's loss, and of a final weight, over NUM_STEPS steps."""
    reference = PeftReference(model, trainer.adapter.spec, trainer.adapter.weights(), trainer.config)
    batches = [trainer.cursor.batch(step) for step in range(NUM_STEPS)]
    theirs = list(reference.losses(trainer.train, batches, trainer.num_steps))
    ours = [trainer.step().loss for _ in range(NUM_STEPS)]
    assert ours[-1] < 0.8 * ours[0], "nothing was learned, so nothing was compared"
    in_loss = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    in_weights = reference.largest_difference(trainer.adapter.weights())
    moved = max(float(pair.b.abs().max()) for pair in trainer.adapter.weights().modules.values())
    print(f"\nparity, {what}: {NUM_STEPS} steps, loss {ours[0]:.3f} -> {ours[-1]:.3f}; largest difference of a loss"
          f" {in_loss:.2g}, of a weight {in_weights:.2g} (weights of B reach {moved:.2g})")  # fmt: skip
    return in_loss, in_weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "spec"),
    [
        (CONFIG, SPEC),
        (replace(CONFIG, schedule=Schedule.COSINE, weight_decay=0.1, warmup_ratio=0.2), replace(SPEC, use_rslora=True)),
        (
            replace(CONFIG, schedule=Schedule.CONSTANT),
            replace(SPEC, target_modules=("q_proj", "down_proj"), layers_to_transform=(1,)),
        ),
    ],
    ids=["linear", "cosine, weight decay, rsLoRA", "constant, two modules of one layer"],
)
def test_in_fp32_losses_and_final_weights_are_those_of_plain_peft(
    grafted: GraftedBase, codec: TemplateCodec, tiny_llama_dir: Path, config: TrainConfig, spec: LoraSpec
) -> None:
    config = replace(config, learning_rate=1e-2 if spec.layers_to_transform else config.learning_rate)
    trainer = make_trainer(grafted, chats(codec), chats(codec, 6, seed=1), config, spec)
    in_loss, in_weights = _compare(
        trainer, LlamaForCausalLM.from_pretrained(tiny_llama_dir), f"fp32, {config.schedule}"
    )
    assert in_loss < 2e-5
    assert in_weights < 5e-5


@pytest.mark.slow
def test_on_an_nf4_base_losses_are_those_of_plain_qlora_within_bfloat16(
    codec: TemplateCodec, tiny_llama_dir: Path
) -> None:
    """bitsandbytes' own layers, which on CPU must never have run in eval mode before (the gradient would be cut)."""
    base = load_base_model(str(tiny_llama_dir), quantization="nf4", device="cpu", name="tiny")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    train: Corpus = chats(codec)
    adapter = TrainableLora(SPEC, base.signature, seed=7, device=torch.device("cpu"))
    trainer = Trainer(base.model, adapter, train, chats(codec, 6, seed=1), CONFIG)
    in_loss, in_weights = _compare(trainer, model, "NF4 with bfloat16")
    assert in_loss < 0.02
    assert in_weights < 0.05
