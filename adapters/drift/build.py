"""Makes a drift reference of the prompts that an adapter was trained on. Knows no file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from adapters.drift.reference import DriftReference

MIN_PROMPTS = 64


def build_reference(
    embeddings: NDArray[np.float32],
    scalars: Mapping[str, NDArray[np.float64]],
    *,
    basis: str,
    run_length: float,
    seed: int,
    check: Callable[[], None],
) -> DriftReference:
    """embeddings: [n, d], scalars: [n] each, row by row of one prompt. Raises TooFewPromptsError.

    `check` is called often and may raise. The same input gives the same reference.
    """
    raise NotImplementedError
