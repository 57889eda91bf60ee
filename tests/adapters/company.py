"""Several trainers at once, each in a thread of its own, as the service runs them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from adapters.packed_model import AskedRows
from adapters.shared_forward import SharedForward
from adapters.trainer import Trainer


@dataclass
class Witness:
    """Stands before the packed model of a shared forward and counts how many travel; may raise in their place."""

    shared: SharedForward
    sizes: Counter[int] = field(default_factory=Counter)
    failing: Callable[[Sequence[AskedRows]], None] = lambda packs: None

    def __post_init__(self) -> None:
        self._model: Any = self.shared.model
        self.shared.model = self  # type: ignore[assignment]

    def __call__(self, packs: Sequence[AskedRows], route: Any, *, recompute: bool) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.sizes[len(packs)] += 1
            self.failing(packs)
        logits: torch.Tensor = self._model(packs, route, recompute=recompute)
        return logits

    def head_rows(self, packs: Sequence[AskedRows]) -> list[int]:
        rows: list[int] = self._model.head_rows(packs)
        return rows


def at_once(tasks: Sequence[Callable[[], object]], seconds: float = 60) -> list[BaseException | None]:
    """Run all, each in its thread, and return what each raised. A test that hangs fails here."""
    errors: list[BaseException | None] = [None] * len(tasks)
    start = threading.Barrier(len(tasks))

    def go(index: int, task: Callable[[], object]) -> None:
        try:
            start.wait(seconds)
            task()
        except BaseException as error:
            errors[index] = error

    threads = [threading.Thread(target=go, args=item, daemon=True) for item in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive(), "a thread hangs"
    return errors


def steps(trainer: Trainer, num_steps: int) -> Callable[[], None]:
    """A task: so many steps and whatever evaluation falls due, then leave."""

    def task() -> None:
        try:
            for _ in range(num_steps):
                trainer.step()
                if trainer.evaluation_due:
                    trainer.evaluate()
        finally:
            trainer.leave()

    return task
