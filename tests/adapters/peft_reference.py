"""The loop everybody writes from PEFT's documentation: padded batches, torch's AdamW. The trainer's judge."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

from adapters.corpus import Corpus
from adapters.lora_weights import LoraSpec, LoraWeights
from adapters.recipe import Schedule, TrainConfig


class PeftReference:
    """`model` becomes PEFT's, with the weights of `start`; `losses` trains it on the given batches."""

    def __init__(self, model: Any, spec: LoraSpec, start: LoraWeights, config: TrainConfig) -> None:
        lora = LoraConfig(
            r=spec.r,
            lora_alpha=spec.lora_alpha,  # type: ignore[arg-type]
            target_modules="all-linear" if spec.target_modules == "all-linear" else list(spec.target_modules),
            layers_to_transform=None if spec.layers_to_transform is None else list(spec.layers_to_transform),
            use_rslora=spec.use_rslora,
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():  # peft reads an attribute that transformers renamed
            warnings.simplefilter("ignore", FutureWarning)
            self.model: Any = get_peft_model(model, lora)
        self.model.train()  # before any forward: on CPU, eval mode would repack 4-bit weights and cut the gradient
        self._config = config
        self._named = dict(self.model.named_parameters())
        self._parameters = [p for p in self._named.values() if p.requires_grad]
        with torch.no_grad():
            for name, pair in start.modules.items():
                self.half(name, "A").copy_(pair.a)
                self.half(name, "B").copy_(pair.b)
        assert len(self._parameters) == 2 * len(start.modules)
        self._optimizer = torch.optim.AdamW(self._parameters, lr=config.learning_rate, weight_decay=config.weight_decay)

    def half(self, name: str, half: str) -> nn.Parameter:
        parameter: nn.Parameter = self._named[f"base_model.model.{name}.lora_{half}.default.weight"]
        return parameter

    def losses(self, corpus: Corpus, batches: list[list[int]], num_steps: int) -> Iterator[float]:
        """Train on the batches and yield each one's loss; the schedule is that of a run of `num_steps`."""
        for step, batch in enumerate(batches):
            ids, mask, labels = _collate(corpus, batch)
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            loss.backward()
            nn.utils.clip_grad_norm_(self._parameters, self._config.max_grad_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = self._config.learning_rate * _share(self._config, step, num_steps)
            self._optimizer.step()
            self._optimizer.zero_grad()
            yield loss.item()

    def largest_difference(self, weights: LoraWeights) -> float:
        """Over all entries of all matrices."""
        return max(
            (self.half(name, half).detach() - mine).abs().max().item()
            for name, pair in weights.modules.items()
            for half, mine in (("A", pair.a), ("B", pair.b))
        )


def _share(config: TrainConfig, step: int, num_steps: int) -> float:
    """Spelled out once more, so that a slip in the trainer's own does not repeat itself here."""
    warmup = max(1, round(config.warmup_ratio * num_steps))
    if step + 1 <= warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (num_steps - warmup)
    shares: Mapping[Schedule, float] = {
        Schedule.LINEAR: 1 - progress,
        Schedule.COSINE: 0.5 + 0.5 * math.cos(math.pi * progress),
        Schedule.CONSTANT: 1.0,
    }
    return shares[config.schedule]


def _collate(corpus: Corpus, batch: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels: [examples, longest], padded on the right."""
    rows = [corpus.sequence(index) for index in batch]
    shape = len(rows), max(len(tokens) for tokens, _ in rows)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for row, (tokens, learned) in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.where(learned, tokens.long(), -100)
    return ids, mask, labels
