"""Four jobs of small batches: trained together on the one base, against one after another.

Other data, seeds and ranks for each; the same steps on both sides. Each job has a thread of its own when together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from adapters.recipe import TrainConfig
from adapters.shared_forward import SharedForward
from adapters.trainable import TrainableLora
from adapters.trainer import Trainer
from bench.goals import goal
from bench.measurement import Entry, interleave, quantity, ratio
from bench.plan import Plan
from bench.subject import Subject, lora_spec
from bench.training import random_corpus

NUM_JOBS = 4
BATCH_SIZE = 4
SHORTEST, LONGEST = 16, 32


def measure(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """Real tokens of all jobs per second; and of the four together, the slowest's share of the fastest's."""
    shared = SharedForward(subject.base.model, subject.base.device)
    apart = [_trainer(subject, seed, None) for seed in range(NUM_JOBS)]
    joint = [_trainer(subject, seed, shared) for seed in range(NUM_JOBS)]
    num_steps = 2 * plan.training_steps
    with ThreadPoolExecutor(NUM_JOBS, thread_name_prefix="training") as pool:

        def one_after_another() -> Mapping[str, float]:
            start = time.perf_counter()
            num_tokens = sum(_steps(trainer, num_steps)[0] for trainer in apart)
            return {"training": num_tokens / (time.perf_counter() - start)}

        def together() -> Mapping[str, float]:
            start = time.perf_counter()
            done = list(pool.map(lambda trainer: _steps(trainer, num_steps), joint))
            elapsed = time.perf_counter() - start
            rates = [num_tokens / seconds for num_tokens, seconds in done]
            return {"training": sum(tokens for tokens, _ in done) / elapsed, "share": min(rates) / max(rates)}

        _warm(apart, joint, pool)
        samples = interleave({"jobs in turn": one_after_another, "jobs together": together}, plan.training_rounds, tick)
    name = "4 jobs together ÷ one after another"
    target = goal(name, cuda=subject.is_cuda)
    return [
        quantity("jobs in turn.training", samples, "tokens/s"),
        quantity("jobs together.training", samples, "tokens/s"),
        quantity("jobs together.share", samples, "ratio"),
        ratio(name, samples, "jobs together.training", "jobs in turn.training", target),
    ]


def _trainer(subject: Subject, seed: int, shared: SharedForward | None) -> Trainer:
    r = (subject.sizes.r, 2 * subject.sizes.r)[seed % 2]
    spec = replace(lora_spec(subject.sizes), r=r)
    adapter = TrainableLora(spec, subject.base.signature, seed=seed, device=subject.base.device)
    config = TrainConfig(
        num_epochs=1_000_000, batch_size=BATCH_SIZE, learning_rate=2e-4, seed=seed, eval_every=1_000_000_000
    )
    corpus = random_corpus(subject.sizes.vocabulary, 16 * BATCH_SIZE, SHORTEST, LONGEST, seed=seed)
    return Trainer(subject.base.model, adapter, corpus, corpus, config, shared)


def _steps(trainer: Trainer, num_steps: int) -> tuple[int, float]:
    """Tokens and seconds of so many steps."""
    start, before = time.perf_counter(), trainer.trained_tokens
    for _ in range(num_steps):
        trainer.step()
    trainer.leave()
    return trainer.trained_tokens - before, time.perf_counter() - start


def _warm(apart: Sequence[Trainer], joint: Sequence[Trainer], pool: ThreadPoolExecutor) -> None:
    for trainer in apart:
        _steps(trainer, 1)
    list(pool.map(lambda trainer: _steps(trainer, 2), joint))
