"""What a run minimises over the examples of one corpus, pack by pack. Knows no optimizer and no order of examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from adapters.corpus import Corpus
from adapters.lora import Routing


@dataclass(frozen=True)
class PackResult:
    """`loss`: the pack's share of the batch's loss, to be differentiated. `sums`: scalars of what is measured."""

    loss: torch.Tensor
    sums: Mapping[str, torch.Tensor]


class Objective(Protocol):
    """Examples are numbered from 0; a batch is a list of such numbers, a pack a part of a batch.

    Divisors are those of the whole batch: means of packs would weigh short packs too much.
    """

    corpus: Corpus

    def __len__(self) -> int: ...

    def packs(self, batch: list[int]) -> list[list[int]]: ...

    def num_tokens(self, batch: list[int]) -> int: ...

    def longest(self, batch: list[int]) -> int:
        """Tokens of the example that no pack can divide."""
        ...

    def divisors(self, batch: list[int]) -> Mapping[str, int]:
        """By what each of the batch's sums is divided."""
        ...

    def prepare(self, start: Routing, between_packs: Callable[[], None]) -> None:
        """Whatever has to be known of the weights at the start of the run; once, before the first pack."""
        ...

    def __call__(self, pack: list[int], divisors: Mapping[str, int], route: Routing | None) -> PackResult: ...

    def state_dict(self) -> dict[str, Any]:
        """What `prepare` found."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Means:
    """Sums of packs, gathered on the device and read once."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, sums: Mapping[str, torch.Tensor]) -> None:
        for name, value in sums.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def over(self, divisors: Mapping[str, int]) -> dict[str, float]:
        names = list(self._sums)
        values = torch.stack([self._sums[name] for name in names]).tolist()
        return {name: value / divisors[name] for name, value in zip(names, values, strict=True)}


@torch.no_grad()
def measure(
    objective: Objective, batch: list[int], route: Routing | None, between_packs: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """The means over these examples, without gradients."""
    divisors, means = objective.divisors(batch), Means()
    for pack in objective.packs(batch):
        means.add(objective(pack, divisors, route).sums)
        between_packs()
    return means.over(divisors)
