"""transformers and PEFT on the bench's checkpoint, as their users would run them. Knows nothing of the engine.

Weights are bitsandbytes' own 4-bit layers, quantized as the engine's base is.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from bench.subject import Subject, lora_spec


def load_plain(subject: Subject) -> PreTrainedModel:
    """NF4 with double quantization and bfloat16 compute. It has not run yet, so it may still be trained."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        subject.directory,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        device_map={"": str(subject.base.device)},
    )
    return model


def with_adapters(model: PreTrainedModel, subject: Subject, num_adapters: int) -> PeftModel:
    """Random adapters "0", "1", ... of the same shape as the engine's."""
    spec = lora_spec(subject.sizes)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=int(spec.lora_alpha),
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft reads an attribute that transformers renamed
        warnings.simplefilter("ignore", FutureWarning)
        peft: PeftModel = get_peft_model(model, config, adapter_name="0")
        for index in range(1, num_adapters):
            peft.add_adapter(str(index), config)
    return peft


class StaticBatch:
    """`generate` on one left-padded batch; with `names`, PEFT's mixed batch."""

    def __init__(self, model: Any, prompts: Sequence[tuple[int, ...]], names: list[str] | None = None) -> None:
        self._model = model.eval()
        longest = max(map(len, prompts))
        pad = model.config.pad_token_id
        device = model.device
        self._ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
        self._mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        self._options: dict[str, Any] = {} if names is None else {"adapter_names": names}

    def run(self, num_tokens: int) -> int:
        """Decode exactly `num_tokens` for each row, greedily; returns the number of new tokens."""
        with torch.inference_mode():
            ids = self._model.generate(
                input_ids=self._ids,
                attention_mask=self._mask,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                **self._options,
            )
        return int(ids.shape[0] * (ids.shape[1] - self._ids.shape[1]))
