"""How many tokens the examples have in the base's own tokenizer and chat format, and which do not fit the model."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from adapters.corpus import Codec, tokenize
from adapters.data_report.finding import FileParam, Finding, Severity
from adapters.data_report.hits import Hits, Limits
from adapters.data_report.redaction import Redactor
from adapters.data_report.row import Row
from adapters.errors import DatasetError

PERCENTILES = (5, 25, 50, 75, 90, 95, 99)


class LengthCheck:
    """Counts what `build_corpus` would train on."""

    def __init__(self, file: FileParam, limits: Limits, codec: Codec, max_length: int, redactor: Redactor) -> None:
        self._file = file
        self._codec = codec
        self._max_length = max_length
        self._redactor = redactor
        self._tokens, self._learned = array("I"), array("I")
        self._num_lost = 0
        self._truncated, self._unanswered, self._refused = (Hits(limits.max_lines) for _ in range(3))

    def add(self, row: Row) -> None:
        try:
            sequences = tokenize(row.example, self._codec)
        except DatasetError as error:
            self._refused.add(row.line)
            if self._refused.wants_excerpt:
                self._refused.excerpts.append(f"line {row.line}: {self._redactor.excerpt(error.message)}")
            return
        longest = max(len(sequence.tokens) for sequence in sequences)
        self._tokens.append(longest)
        self._learned.append(sum(stop - start for sequence in sequences for start, stop in sequence.spans))
        if any(sequence.spans[0][0] >= self._max_length for sequence in sequences):
            self._unanswered.add(row.line)
        elif longest > self._max_length:
            self._truncated.add(row.line)
            self._num_lost += longest - self._max_length

    def findings(self) -> list[Finding]:
        limit = self._max_length
        return [
            *self._refused.finding(
                "template_refusal",
                Severity.ERROR,
                self._file,
                "The base's chat template refuses these messages: change their roles or order.",
            ),
            *self._unanswered.finding(
                "prompt_too_long",
                Severity.ERROR,
                self._file,
                f"The prompt alone fills the model's {limit} tokens, so no answer is left: shorten or remove them.",
            ),
            *self._truncated.finding(
                "truncated",
                Severity.WARNING,
                self._file,
                f"Longer than {limit} tokens: {self._num_lost} at the ends of answers are cut. Shorten or split these.",
            ),
        ]

    def statistics(self) -> dict[str, Any]:
        return {
            "max_length": self._max_length,
            "example": _distribution(self._tokens),
            "learned": _distribution(self._learned),
            "num_truncated": self._truncated.count,
        }


def _distribution(counts: array[int]) -> dict[str, Any] | None:
    """Of token counts: sum, mean, least, most and percentiles."""
    if not counts:
        return None
    values = np.array(counts, dtype=np.int64)
    percentiles = np.percentile(values, PERCENTILES).tolist()
    return {
        "sum": int(values.sum()),
        "mean": round(float(values.mean()), 2),
        "min": int(values.min()),
        **{f"p{p}": round(value, 1) for p, value in zip(PERCENTILES, percentiles, strict=True)},
        "max": int(values.max()),
    }
