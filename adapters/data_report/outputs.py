"""Whether a file's outputs are labels, JSON or text. Holds a bounded number of distinct outputs; knows no inputs."""

from __future__ import annotations

import json
from collections import Counter
from enum import StrEnum

from adapters.data_report.hits import Hits
from adapters.data_report.row import Row

MAX_LABEL_CHARACTERS, MAX_LABEL_WORDS = 60, 8
MAX_LABELS = 2000
MIN_LABELLED = 20
LABEL_SHARE = 0.95
USED_AGAIN_SHARE = 0.9
JSON_SHARE = 0.9


class OutputKind(StrEnum):
    LABELS = "labels"
    JSON = "json"
    TEXT = "text"


class Outputs:
    """Outputs *look like labels* when all of this holds for a file of at least 20 examples:

    - at least 95 % of the answers are one line of at most 60 characters and 8 words, and no JSON object or list;
    - at least 90 % of these answers are used by another example, too;
    - there are at most 2000 different ones, and at most a third as many as such answers.

    They are JSON when at least 90 % of them parse as an object or a list. Everything else is text.
    """

    def __init__(self, max_lines: int) -> None:
        self.counts: Counter[str] = Counter()
        """Short answers as written, and how often."""
        self.not_json = Hits(max_lines)
        self.long = Hits(max_lines)
        self._num = self._num_json = self._num_short = 0
        self._overflowed = False

    def add(self, row: Row) -> None:
        self._num += 1
        answer = row.answer.strip()
        if _is_json(answer):
            self._num_json += 1
            return
        self.not_json.add(row.line)
        if not could_be_label(answer):
            self.long.add(row.line)
            return
        self._num_short += 1
        if answer in self.counts or len(self.counts) < MAX_LABELS + 1:
            self.counts[answer] += 1
        else:
            self._overflowed = True

    @property
    def kind(self) -> OutputKind:
        if self._num and self._num_json >= JSON_SHARE * self._num:
            return OutputKind.JSON
        return OutputKind.LABELS if self._are_labels() else OutputKind.TEXT

    def _are_labels(self) -> bool:
        if self._num < MIN_LABELLED or self._overflowed or len(self.counts) > MAX_LABELS:
            return False
        again = sum(count for count in self.counts.values() if count > 1)
        return (
            self._num_short >= LABEL_SHARE * self._num
            and again >= USED_AGAIN_SHARE * self._num_short
            and 3 * len(self.counts) <= self._num_short
        )


def could_be_label(answer: str) -> bool:
    """One short line."""
    return len(answer) <= MAX_LABEL_CHARACTERS and "\n" not in answer and len(answer.split()) <= MAX_LABEL_WORDS


def _is_json(answer: str) -> bool:
    if answer[:1] + answer[-1:] not in ("{}", "[]"):
        return False
    try:
        json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return True
