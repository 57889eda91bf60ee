"""What an adapter does to the base's grasp of general text: perplexity without it and with it.

The texts are the project's own (`general_text.txt`, a paragraph each); no training set has seen them. Knows no task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapters.corpus import Codec, text_corpus
from adapters.evaluation_report import Forgetting
from adapters.lora import Routing
from adapters.packed_loss import PackedLoss
from adapters.statistics import Resampling, Rows

GENERAL_TEXT = Path(__file__).with_name("general_text.txt")


def general_texts() -> list[str]:
    """The bundled paragraphs."""
    paragraphs = GENERAL_TEXT.read_text(encoding="utf-8").split("\n\n")
    return [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]


def measure_forgetting(
    texts: Sequence[str],
    codec: Codec,
    loss: PackedLoss,
    route: Routing,
    *,
    max_length: int,
    seed: int,
    between_packs: Callable[[], None] = lambda: None,
) -> Forgetting:
    """Two passes over `texts`, forward only."""
    corpus = text_corpus(texts, codec, max_length=max_length)
    base, num_tokens = loss.per_sequence(corpus, None, between_packs)
    adapted, _ = loss.per_sequence(corpus, route, between_packs)
    rows = np.stack([np.array(adapted) - np.array(base), np.array(num_tokens, dtype=np.float64)], axis=1)
    found = Resampling(len(texts), seed).estimate(rows, _ratio_of_perplexities)
    total = sum(num_tokens)
    return Forgetting(
        num_texts=len(texts),
        base_perplexity=exp(min(sum(base) / total, 700.0)),
        perplexity=exp(min(sum(adapted) / total, 700.0)),
        ratio=found.value,
        low=found.low,
        high=found.high,
    )


def _ratio_of_perplexities(sums: Rows) -> NDArray[np.float64]:
    return np.asarray(np.exp(np.minimum(sums[..., 0] / sums[..., 1], 700.0)))
