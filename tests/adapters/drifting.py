"""Small sources of vectors and numbers with a known distribution, and references made of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapters.drift.build import build_reference
from adapters.drift.reference import DriftReference

WIDTH = 24
RUN_LENGTH = 300.0


def vectors(rng: np.random.Generator, num: int, shift: float = 0.0) -> NDArray[np.float32]:
    """[num, WIDTH], more spread in the first directions than in the last, as embeddings are, and heavy-tailed."""
    spread = 1 / np.sqrt(1 + np.arange(WIDTH))
    found: NDArray[np.float32] = (rng.standard_t(5, (num, WIDTH)) * spread + shift * spread).astype(np.float32)
    return found


def numbers(rng: np.random.Generator, num: int) -> dict[str, NDArray[np.float64]]:
    """One with many equal values, one without."""
    return {"prompt_length": rng.poisson(8, num).astype(np.float64), "prompt_nll": rng.gamma(4.0, size=num)}


def reference(seed: int, num: int = 100, run_length: float = RUN_LENGTH) -> DriftReference:
    rng = np.random.default_rng([seed, 1])
    return build_reference(
        vectors(rng, num), numbers(rng, num), basis="a base", run_length=run_length, seed=seed, check=nothing
    )


def nothing() -> None:
    """A check that never stops anything."""
