"""A reference of a random part of a pool, and the prompts that are left. Knows no stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.drift.build import build_reference
from adapters.drift.reference import DriftReference
from bench.drift.prompts import PromptEmbedder, Prompts
from bench.drift.streams import Indices
from bench.drift.texts import Shift, distinct

Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    reference: DriftReference
    chosen: Indices
    rest: Indices


@dataclass(frozen=True)
class ShiftedPrompts:
    """`before` and `after` are indices of `prompts`."""

    prompts: Prompts
    before: Indices
    after: Indices

    @classmethod
    def of(cls, shift: Shift, embedder: PromptEmbedder) -> ShiftedPrompts:
        texts = distinct([shift.before, shift.after])
        place = {text: index for index, text in enumerate(texts)}
        before, after = (np.array([place[text] for text in some]) for some in (shift.before, shift.after))
        return cls(embedder.embed(texts), before, after)


def trials(
    rng: np.random.Generator, prompts: Prompts, pool: Indices, *, size: int, promise: float, count: int
) -> Iterator[Trial]:
    """`count` random splits of the pool, each with the reference of its first `size` prompts."""
    for seed in range(count):
        chosen, rest = np.split(rng.permutation(pool), [size])
        yield Trial(make_reference(prompts, chosen, promise, seed), chosen, rest)


def make_reference(prompts: Prompts, chosen: Indices, promise: float, seed: int) -> DriftReference:
    numbers = {name: values[chosen] for name, values in prompts.numbers.items()}
    return build_reference(
        prompts.embeddings[chosen], numbers, basis="bench", run_length=promise, seed=seed, check=nothing
    )


def nothing() -> None:
    """Nobody cancels a bench."""
