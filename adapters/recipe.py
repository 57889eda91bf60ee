"""How a run is set up: the chosen numbers, what "auto" becomes, and the learning rate over time. Knows no tensors.

The defaults are what practitioners agree on (LoRA wants about ten times the learning rate of a full fine-tune,
"LoRA Without Regret", Thinking Machines 2025; small models want far more).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import ceil, cos, log, pi

SMALL_MODEL, SMALL_MODEL_LEARNING_RATE = 100e6, 2e-3
LARGE_MODEL, LARGE_MODEL_LEARNING_RATE = 1e9, 2e-4

FEW_EXAMPLES_SEEN, MANY_EXAMPLES_SEEN = 100, 25_000
MAX_AUTO_EPOCHS = 25
EVALUATION_SHARE = 0.15


class Schedule(StrEnum):
    """How the learning rate falls after its linear warm-up."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on besides data and base."""

    num_epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    eval_every: int
    """Optimizer steps between evaluations on the validation examples."""
    patience: int | None = None
    """Evaluations without a better validation loss after which the run stops; None: it never stops early."""
    schedule: Schedule = Schedule.LINEAR
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    max_slice_tokens: int = 2048
    """Tokens of one uninterrupted forward-backward: bounds memory and the wait for a pause."""
    max_bad_steps: int = 3
    """Steps in a row with a loss or gradient that is not finite, after which the run fails."""
    max_steps: int | None = None
    """Ends the run, and its schedule, before the last epoch does."""
    beta: float | None = None
    """Of a run that learns from pairs (DPO): how dear it is to move away from the reference."""
    kl_to_base: float = 0.0
    """What a nat of divergence from the base costs on the prompts (see `adapters.supervised`)."""
    recompute_layers: bool | None = None
    """Activation checkpointing: from the start, never, or (None) once memory has run out."""


def auto_epochs(num_examples: int, num_parameters: float, share: float = 1.0) -> int:
    """Three passes over a large model's data, eight over a small one's, times `share`; more for few examples, fewer
    for many.

    Keeps examples x epochs within 100..25 000.
    """
    usual = ceil(share * (3 if num_parameters >= LARGE_MODEL else 8))
    fewest = ceil(FEW_EXAMPLES_SEEN / num_examples)
    most = max(1, MANY_EXAMPLES_SEEN // num_examples)
    return min(max(usual, fewest), most, MAX_AUTO_EPOCHS)


def auto_batch_size(num_examples: int) -> int:
    """8 examples a step, 16 from a thousand examples on; never so many that an epoch has fewer than 5 steps."""
    usual = 16 if num_examples >= 1000 else 8
    return max(1, min(usual, num_examples // 5))


def auto_learning_rate(num_parameters: float) -> float:
    """2e-3 up to 100 M parameters, 2e-4 from 1 B on, log-linear between."""
    reach = log(num_parameters / SMALL_MODEL) / log(LARGE_MODEL / SMALL_MODEL)
    share = min(1.0, max(0.0, reach))
    return float(SMALL_MODEL_LEARNING_RATE * (LARGE_MODEL_LEARNING_RATE / SMALL_MODEL_LEARNING_RATE) ** share)


def auto_eval_every(num_steps: int, num_valid: int, batch_size: int, evaluations: int = 20) -> int:
    """About `evaluations` in a run, fewer where they would take more than a seventh of its time.

    A validation example costs a forward only: a third of a training example.
    """
    affordable = ceil(num_valid / (3 * EVALUATION_SHARE * batch_size))
    return max(1, num_steps // evaluations, min(affordable, num_steps))


def auto_probe_steps(num_steps: int) -> int:
    """A tenth of the run, 10 to 40 steps: enough to tell rates apart that are a factor of three from each other."""
    return min(num_steps, max(10, min(num_steps // 10, 40)))


def steps_per_epoch(num_sequences: int, batch_size: int) -> int:
    """The last batch of an epoch may be smaller."""
    return ceil(num_sequences / batch_size)


def num_steps(config: TrainConfig, num_examples: int) -> int:
    """Of a whole run."""
    whole = config.num_epochs * steps_per_epoch(num_examples, config.batch_size)
    return whole if config.max_steps is None else min(whole, config.max_steps)


def learning_rate_factor(schedule: Schedule, step: int, num_steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at `step` (0-based): a linear rise, then a fall that ends above 0, or none."""
    warmup = max(1, round(warmup_ratio * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    left = (num_steps - step) / max(1, num_steps - warmup)
    match schedule:
        case Schedule.LINEAR:
            return left
        case Schedule.COSINE:
            return (1 - cos(pi * left)) / 2
        case Schedule.CONSTANT:
            return 1.0
