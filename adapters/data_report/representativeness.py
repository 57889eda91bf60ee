"""How far the validation examples lie from the training examples: a two-sample classifier test. Knows texts only.

Method (Lopez-Paz and Oquab 2017): as many training as validation examples, at most 400 each, one for each distinct
input; hashed TF-IDF of words and word pairs, at length one; kernel ridge regression tells which file an example is
from, 5-fold cross-validated; the area under the ROC curve (AUC), averaged over the folds, is the distance: 0.5 when the
files cannot be told apart, 1 when each example gives its file away. The same with the files' labels permuted 199 times
calibrates it: `p_value` is the share of random splits that are at least as far apart.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.data_report.finding import Finding, Severity
from adapters.data_report.row import Row

Matrix = NDArray[np.float64]

MAX_SAMPLED, MIN_SAMPLED = 400, 20
NUM_FEATURES = 8192
NUM_FOLDS, NUM_PERMUTATIONS = 5, 199
RIDGE = 0.5
MAX_CHARACTERS = 2000
FAR, NOTABLE = 0.7, 0.62
SIGNIFICANT = 0.01
SEED = 7

_WORD = re.compile(r"\w+|[^\w\s]")


class Sample:
    """A uniform sample of the distinct inputs of a file, however often each occurs: those of the smallest hashes."""

    def __init__(self, salt: bytes) -> None:
        self._salt = salt
        self._heap: list[tuple[int, str]] = []
        self._ranks: set[int] = set()

    def add(self, row: Row) -> None:
        key = row.input_key.to_bytes(8)
        rank = -int.from_bytes(blake2b(key, digest_size=8, key=self._salt).digest())
        full = len(self._heap) == MAX_SAMPLED
        if rank in self._ranks or (full and rank < self._heap[0][0]):
            return
        entry = (rank, f"{row.question[:MAX_CHARACTERS]}\n{row.answer[:MAX_CHARACTERS]}")
        if full:
            self._ranks.discard(heapq.heappushpop(self._heap, entry)[0])
        else:
            heapq.heappush(self._heap, entry)
        self._ranks.add(rank)

    def texts(self, count: int) -> list[str]:
        return [text for _, text in sorted(self._heap, reverse=True)[:count]]

    def __len__(self) -> int:
        return len(self._heap)


@dataclass(frozen=True)
class Distance:
    """`usual` is the AUC that one random split in twenty reaches."""

    auc: float
    usual: float
    p_value: float
    num_sampled: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "auc": round(self.auc, 4),
            "auc_of_random_splits_p95": round(self.usual, 4),
            "p_value": round(self.p_value, 4),
            "num_sampled_per_file": self.num_sampled,
        }

    def findings(self) -> list[Finding]:
        if self.auc < NOTABLE or self.p_value > SIGNIFICANT:
            return []
        far = self.auc >= FAR
        advice = (
            f"A classifier tells the two files apart (AUC {self.auc:.2f}; random splits reach {self.usual:.2f}): what"
            " is measured on one may not hold for the other. Split at random, unless the difference is meant."
        )
        severity = Severity.WARNING if far else Severity.INFO
        return [Finding("unrepresentative_validation", severity, "validation_file", self.num_sampled, advice)]


def distance(train: Sample, valid: Sample, breathe: Callable[[], None]) -> Distance | None:
    """None where a file has too few distinct inputs to tell. `breathe` is called between the folds."""
    size = min(len(train), len(valid))
    if size < MIN_SAMPLED:
        return None
    features = tf_idf([*train.texts(size), *valid.texts(size)], breathe)
    kernel = features @ features.T
    labels = np.concatenate([np.ones(size), -np.ones(size)])
    generator = np.random.default_rng(SEED)
    folds = np.concatenate([generator.permutation(np.arange(size) % NUM_FOLDS) for _ in range(2)])
    permuted = [_permute_within(labels, folds, generator) for _ in range(NUM_PERMUTATIONS)]
    aucs = _cross_validated(kernel, np.stack([labels, *permuted], axis=1), folds, breathe)
    observed, random = float(aucs[0]), aucs[1:]
    p_value = (1 + int((random >= observed).sum())) / (1 + NUM_PERMUTATIONS)
    return Distance(observed, float(np.quantile(random, 0.95)), p_value, size)


def tf_idf(texts: list[str], breathe: Callable[[], None] = lambda: None) -> Matrix:
    """Hashed words and word pairs, logarithmic frequencies, rows of length one: [num_texts, NUM_FEATURES]."""
    counts = np.zeros((len(texts), NUM_FEATURES))
    for index, text in enumerate(texts):
        words = _WORD.findall(text.casefold())
        for term in (*words, *map(" ".join, pairwise(words))):
            counts[index, int.from_bytes(blake2b(term.encode(), digest_size=4).digest()) % NUM_FEATURES] += 1
        breathe()
    in_how_many = (counts > 0).sum(axis=0)
    weights = np.log1p(counts) * np.log((1 + len(texts)) / (1 + in_how_many))
    lengths: Matrix = np.linalg.norm(weights, axis=1, keepdims=True)
    scaled: Matrix = weights / np.maximum(lengths, 1e-12)
    return scaled


def auc(scores: Matrix, positive: NDArray[np.bool_]) -> float:
    """Chance that a positive scores above a negative one (Mann-Whitney), ties counting half."""
    above = scores[positive][:, None] - scores[~positive][None, :]
    return float((above > 0).mean() + (above == 0).mean() / 2)


def _cross_validated(kernel: Matrix, labels: Matrix, folds: NDArray[np.int_], breathe: Callable[[], None]) -> Matrix:
    """Mean AUC over the folds of each column of `labels`: [n, k] of ±1 -> [k]. One factorisation serves all columns."""
    totals = np.zeros(labels.shape[1])
    for fold in range(NUM_FOLDS):
        held_out = folds == fold
        inner = kernel[np.ix_(~held_out, ~held_out)]
        weights = np.linalg.solve(inner + RIDGE * np.eye(len(inner)), labels[~held_out])
        scores = kernel[np.ix_(held_out, ~held_out)] @ weights
        for column in range(labels.shape[1]):
            totals[column] += auc(scores[:, column], labels[held_out, column] > 0)
        breathe()
    return totals / NUM_FOLDS


def _permute_within(labels: Matrix, folds: NDArray[np.int_], generator: np.random.Generator) -> Matrix:
    permuted = labels.copy()
    for fold in range(NUM_FOLDS):
        members = folds == fold
        permuted[members] = generator.permutation(labels[members])
    return permuted
