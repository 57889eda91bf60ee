"""Times a few slices of a run's own data before its first step. Knows no clock time of day and no job.

The run goes on to the same bits: nothing here moves a master, and dropout's randomness belongs to a step's number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from adapters.estimate import Pace
from adapters.master_optimizer import MasterOptimizer
from adapters.trainer import Trainer

NUM_SLICES = 3
SHARE_OF_RUN = 0.05
MAX_SECONDS = 20.0
SLICE_TOKENS_SHARE = 2
"""A slice has at most so many packs' worth of tokens: enough to be divided as a batch is."""


def calibrate(trainer: Trainer, between_packs: Callable[[], None] = lambda: None) -> Pace:
    """The pace at which this run's next steps will go, under the load of now.

    Up to three batches, a twentieth of the run at most but always one, behind one that warms the kernels up.
    """
    cursor, steps = trainer.cursor, range(trainer.steps_done, trainer.num_steps)
    count = max(1, min(NUM_SLICES, int(SHARE_OF_RUN * len(steps))))
    batches = [_slice(trainer, cursor.batch(steps[len(steps) * i // count])) for i in range(count)]
    trainer.rehearse(batches[0], between_packs)
    tokens, seconds = 0, 0.0
    for batch in batches:
        seconds += _timed(trainer.device, lambda batch=batch: trainer.rehearse(batch, between_packs))  # type: ignore[misc]
        tokens += trainer.objective.num_tokens(batch)
        if seconds > MAX_SECONDS:
            break
    valid = _first(list(range(len(trainer.valid_objective))), trainer.valid_objective.num_tokens, _bound(trainer))
    scoring = _timed(trainer.device, lambda: trainer.rehearse_scoring(valid, between_packs))
    return Pace(seconds / tokens, _update_seconds(trainer), scoring / trainer.valid_objective.num_tokens(valid))


def _slice(trainer: Trainer, batch: list[int]) -> list[int]:
    """A batch, or its beginning where the whole would take long: its order is random, so no length is favoured."""
    return _first(batch, trainer.objective.num_tokens, _bound(trainer))


def _bound(trainer: Trainer) -> int:
    return SLICE_TOKENS_SHARE * trainer.memory.max_slice_tokens


def _first(batch: list[int], num_tokens: Callable[[list[int]], int], bound: int) -> list[int]:
    kept, total = batch[:1], num_tokens(batch[:1])
    for index in batch[1:]:
        total += num_tokens([index])
        if total > bound:
            break
        kept = [*kept, index]
    return kept


def _update_seconds(trainer: Trainer) -> float:
    """Of the optimizer, on copies that are thrown away; its first update, which makes the moments, does not count."""
    copies = _copies(trainer.adapter.parameters())
    optimizer = MasterOptimizer(copies, trainer.config, trainer.num_steps)
    optimizer.apply(0, 0.0)
    return _timed(trainer.device, lambda: optimizer.apply(0, 0.0))


def _copies(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for copy in copies:
        copy.grad = torch.ones_like(copy)
    return copies


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    """Of this thread's own stream: the others' work is not waited for."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
