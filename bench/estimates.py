"""What a run was predicted to take, divided by what it took: three runs of different shape on the same base.

Seconds are those of the steps. On CUDA memory is the allocator's peak; on a CPU the peak of the bytes of all live
tensors, which torch's profiler counts in one step more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from adapters.calibration import calibrate
from adapters.estimate import RunSize, estimate, peak_memory_bytes
from adapters.lora_weights import LoraSpec
from adapters.recipe import TrainConfig
from adapters.trainable import TrainableLora
from adapters.trainer import Trainer
from bench.goals import goal
from bench.measurement import Entry, Goal, interleave, quantity
from bench.plan import Plan
from bench.subject import Subject
from bench.training import random_corpus

_LEARNING_RATE = 2e-4
_QUANTITIES = ("time", "tokens", "memory")


@dataclass(frozen=True)
class Shape:
    """Examples of `shortest` to `longest` tokens, `batch_size` a step."""

    name: str
    shortest: int
    longest: int
    batch_size: int
    r: int


SHAPES = (
    Shape("short, r 8", 20, 60, 16, 8),
    Shape("short, r 32", 20, 60, 16, 32),
    Shape("long, r 8", 200, 400, 4, 8),
)


def measure(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """Predicted ÷ actual of each shape, in every round a new run."""
    shapes = SHAPES[: plan.num_estimates]
    variants = {shape.name: lambda shape=shape: _ratios(subject, plan, shape) for shape in shapes}
    samples = interleave(variants, plan.training_rounds, tick)
    return [
        quantity(f"{shape.name}.{name}", samples, "predicted ÷ actual", _goal(name, subject))
        for shape in shapes
        for name in _QUANTITIES
    ]


def _goal(name: str, subject: Subject) -> Goal | None:
    return goal(f"predicted ÷ actual, {name}", cuda=subject.is_cuda)


def _ratios(subject: Subject, plan: Plan, shape: Shape) -> Mapping[str, float]:
    trainer = _trainer(subject, plan, shape)
    size = RunSize.of(trainer.config, trainer.train, trainer.valid)
    memory = peak_memory_bytes(
        size,
        trainer.adapter.spec,
        subject.base.signature,
        vocabulary=subject.base.vocab_size,
        activation_bytes=subject.base.activation_bytes,
        recompute=False,
    )
    predicted = estimate(size, memory, calibrate(trainer))
    assert predicted.seconds_per_step is not None
    start = time.perf_counter()
    while not trainer.done:
        trainer.step()
    _synchronize(trainer.device)
    seconds = time.perf_counter() - start
    tokens = trainer.trained_tokens
    return {
        "time": predicted.seconds_per_step * predicted.steps / seconds,
        "tokens": predicted.tokens / tokens,
        "memory": predicted.peak_memory_bytes / _peak_bytes(_trainer(subject, plan, shape)),
    }


def _trainer(subject: Subject, plan: Plan, shape: Shape) -> Trainer:
    """The service's trainer on the serving base itself; it never evaluates."""
    corpus = random_corpus(
        subject.sizes.vocabulary, shape.batch_size * plan.training_steps * 2, shape.shortest, shape.longest
    )
    spec = LoraSpec(r=shape.r, lora_alpha=2.0 * shape.r)
    adapter = TrainableLora(spec, subject.base.signature, seed=0, device=subject.base.device)
    config = TrainConfig(
        num_epochs=1, batch_size=shape.batch_size, learning_rate=_LEARNING_RATE, seed=0, eval_every=1_000_000_000
    )
    return Trainer(subject.base.model, adapter, corpus, corpus, config)


def _peak_bytes(trainer: Trainer) -> int:
    """Of live tensors in an epoch's steps, masters, gradients and moments included."""
    masters = sum(parameter.nbytes for parameter in trainer.adapter.parameters())
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
        before = torch.cuda.memory_allocated(trainer.device)
        while not trainer.done:
            trainer.step()
        return masters + torch.cuda.max_memory_allocated(trainer.device) - before
    return masters + max(_profiled(trainer) for _ in range(trainer.num_steps))


def _profiled(trainer: Trainer) -> int:
    """Highest sum of what one step allocates and frees; the moments are there from the first step on."""
    moments = 2 * sum(parameter.nbytes for parameter in trainer.adapter.parameters()) if trainer.steps_done else 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return moments + highest


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
