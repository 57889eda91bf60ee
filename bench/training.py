"""Training tokens per second: the service's trainer against a plain PEFT loop, on the same examples.

Both see the same batches' worth of data in a round: one epoch each, 16 examples a step, same rank, AdamW, clipping.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from adapters.corpus import Corpus
from adapters.recipe import TrainConfig
from adapters.trainable import TrainableLora
from adapters.trainer import Trainer
from bench.goals import goal
from bench.measurement import Entry, interleave, quantity, ratio
from bench.peers import load_plain, with_adapters
from bench.plan import Plan
from bench.subject import Subject, lora_spec

BATCH_SIZE = 16
SHORTEST, LONGEST = 20, 60
_IGNORED = -100
_LEARNING_RATE = 2e-4


def measure(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """Real tokens of the examples per second of forward, backward and optimizer; padding does not count."""
    corpus = random_corpus(subject.sizes.vocabulary, BATCH_SIZE * plan.training_steps)
    trainer = make_trainer(subject, corpus, BATCH_SIZE)
    loop = PeftLoop(subject, corpus)
    trainer.step()
    loop.step(0)

    def rootstock() -> Mapping[str, float]:
        start, before = time.perf_counter(), trainer.trained_tokens
        for _ in range(plan.training_steps):
            trainer.step()
        return {"training": (trainer.trained_tokens - before) / (time.perf_counter() - start)}

    def peft() -> Mapping[str, float]:
        start = time.perf_counter()
        num_tokens = sum(loop.step(step) for step in range(plan.training_steps))
        return {"training": num_tokens / (time.perf_counter() - start)}

    variants = {"trainer": rootstock, "PEFT loop": peft}
    samples = interleave(variants, plan.training_rounds, tick)
    target = goal("training ÷ PEFT", cuda=subject.is_cuda)
    return [
        *(quantity(f"{name}.training", samples, "tokens/s") for name in variants),
        ratio("training ÷ PEFT", samples, "trainer.training", "PEFT loop.training", target),
    ]


def random_corpus(
    vocabulary: int, num_examples: int, shortest: int = SHORTEST, longest: int = LONGEST, seed: int = 3
) -> Corpus:
    """Examples of so many random tokens; the last third of each is the answer that is learned."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (num_examples,), generator=generator)
    stops = lengths.cumsum(0)
    starts = stops - lengths
    num_tokens = int(stops[-1])
    trained = torch.zeros(num_tokens, dtype=torch.bool)
    for stop, length in zip(stops.tolist(), lengths.tolist(), strict=True):
        trained[stop - length // 3 : stop] = True
    return Corpus(
        tokens=torch.randint(4, vocabulary, (num_tokens,), generator=generator, dtype=torch.int32),
        trained=trained,
        spans=torch.stack([starts, stops], dim=1),
        lines=torch.arange(num_examples, dtype=torch.int32),
    )


def make_trainer(subject: Subject, corpus: Corpus, batch_size: int) -> Trainer:
    """The service's trainer on the serving base itself; it never evaluates and never ends."""
    adapter = TrainableLora(lora_spec(subject.sizes), subject.base.signature, seed=0, device=subject.base.device)
    config = TrainConfig(
        num_epochs=1_000_000, batch_size=batch_size, learning_rate=_LEARNING_RATE, seed=0, eval_every=1_000_000_000
    )
    return Trainer(subject.base.model, adapter, corpus, corpus, config)


class PeftLoop:
    """What one writes from PEFT's documentation: padded batches, the model's own loss, AdamW on the adapter.

    The model has never run in eval mode: on CPU that would repack its weights and cut the gradient (bitsandbytes).
    """

    def __init__(self, subject: Subject, corpus: Corpus) -> None:
        model: Any = with_adapters(load_plain(subject), subject, 1)
        self._model = model.train()
        self._corpus = corpus
        self._pad = model.config.pad_token_id
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=_LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(self, index: int) -> int:
        """One optimizer step; returns the number of real tokens."""
        examples = [self._corpus.sequence(index * BATCH_SIZE + i) for i in range(BATCH_SIZE)]
        ids, labels, mask = self._collate(examples)
        self._model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return int(mask.sum())

    def _collate(
        self, examples: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, labels and mask: [examples, longest]."""
        shape = (len(examples), max(len(tokens) for tokens, _ in examples))
        ids = torch.full(shape, self._pad, dtype=torch.int64)
        labels = torch.full(shape, _IGNORED, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, (tokens, learned) in enumerate(examples):
            ids[row, : len(tokens)] = tokens
            labels[row, : len(tokens)] = torch.where(learned, tokens.long(), _IGNORED)
            mask[row, : len(tokens)] = 1
        device = self._model.device
        return ids.to(device), labels.to(device), mask.to(device)
