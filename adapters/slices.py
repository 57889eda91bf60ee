"""Parts of the evaluated examples on which a model does badly: by label and by metadata field. Knows no text metric."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapters.example import Example
from adapters.scoring import plain
from adapters.statistics import Estimate, proportion

MIN_EXAMPLES = 5
"""Fewer say nothing: they are counted, not shown."""
MAX_SHOWN = 10
LABEL = "label"


@dataclass(frozen=True)
class Slice:
    """The examples whose `field` is `value`; `field` "label" is the expected answer. `score` is the candidate's primary
    metric with a 95 % interval for few examples, `base` the base's value."""

    field: str
    value: str
    num_examples: int
    score: Estimate
    base: float | None


def find_slices(
    examples: Sequence[Example],
    candidate: NDArray[np.float64],
    base: NDArray[np.float64] | None,
    *,
    by_label: bool,
) -> tuple[tuple[Slice, ...], int]:
    """The worst slices, worst first, and how many were too small. A field with one value only is no division.

    The worst of many small slices looks worse than it is: read `num_examples` and the interval beside it.
    """
    members: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, example in enumerate(examples):
        for field, value in example.metadata.items():
            members[field][value].append(index)
        if by_label:
            members[LABEL][plain(example.answer)].append(index)
    slices, num_small = [], 0
    for field, values in members.items():
        if len(values) < 2:
            continue
        for value, indices in values.items():
            if len(indices) < MIN_EXAMPLES:
                num_small += 1
                continue
            score = proportion(candidate[indices])
            slices.append(
                Slice(field, value, len(indices), score, None if base is None else float(base[indices].mean()))
            )
    slices.sort(key=lambda part: (part.score.value, part.score.high, part.field, part.value))
    return tuple(slices[:MAX_SHOWN]), num_small
