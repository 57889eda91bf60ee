"""Outputs that are labels (see `Outputs`): too few of one, too many of another, two spellings. Knows no inputs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from statistics import median
from typing import Any

from adapters.data_report.finding import FileParam, Finding, Severity
from adapters.data_report.hits import Hits
from adapters.data_report.outputs import OutputKind, Outputs
from adapters.data_report.row import Row

MIN_PER_LABEL = 5
MAX_IMBALANCE = 20.0
"""Most frequent label to the median one."""
MAX_SHARE_OF_TWO = 0.9
NUM_SHOWN = 20


class LabelLines:
    """The first lines of each short answer, for the findings to name."""

    def __init__(self, max_lines: int) -> None:
        self.max_lines = max_lines
        self._lines: dict[str, list[int]] = {}

    def add(self, row: Row, outputs: Outputs) -> None:
        """After `outputs.add(row)`: only what that counts is kept, and of frequent answers only a few lines."""
        label = row.answer.strip()
        if label in outputs.counts:
            lines = self._lines.setdefault(label, [])
            if len(lines) < MIN_PER_LABEL:
                lines.append(row.line)

    def of(self, labels: Iterable[str]) -> tuple[int, ...]:
        lines = sorted(line for label in labels for line in self._lines.get(label, ()))
        return tuple(lines[: self.max_lines])


def label_findings(outputs: Outputs, lines: LabelLines, file: FileParam) -> list[Finding]:
    """For outputs of the kind LABELS."""
    counts = outputs.counts
    found = [*_rare(counts, lines, file), *_imbalance(counts, file), *_variants(counts, lines, file)]
    if len(counts) == 1:
        advice = "Every answer is the same: nothing depends on the input, so nothing is learned from it."
        found.append(Finding("single_label", Severity.WARNING, file, 1, advice))
    found += outputs.long.finding(
        "not_a_label", Severity.WARNING, file, "Almost all answers are short labels, these are not: check them."
    )
    return found


def json_findings(outputs: Outputs, file: FileParam) -> list[Finding]:
    """For outputs of the kind JSON."""
    return outputs.not_json.finding(
        "invalid_json_answer",
        Severity.WARNING,
        file,
        "Almost all answers are JSON objects or lists, these do not parse.",
    )


def unknown_labels(train: Outputs, valid: Outputs, lines: LabelLines) -> list[Finding]:
    """Labels of the validation file that the training file lacks."""
    if train.kind is not OutputKind.LABELS:
        return []
    unknown = [label for label in valid.counts if label not in train.counts]
    count = sum(valid.counts[label] for label in unknown)
    if not count:
        return []
    advice = "Labels that are never trained on cannot be answered: add examples of them, or remove these."
    hits = Hits(lines.max_lines, count, list(lines.of(unknown)))
    return hits.finding("unknown_labels", Severity.WARNING, "validation_file", advice)


def label_statistics(counts: Counter[str], mask: Any) -> dict[str, Any]:
    return {
        "num_labels": len(counts),
        "smallest": min(counts.values()),
        "median": median(counts.values()),
        "largest": max(counts.values()),
        "most_frequent": {mask(label): count for label, count in counts.most_common(NUM_SHOWN)},
    }


def _rare(counts: Counter[str], lines: LabelLines, file: FileParam) -> list[Finding]:
    rare = [label for label, count in counts.items() if count < MIN_PER_LABEL]
    count = sum(counts[label] for label in rare)
    labels = "label has" if len(rare) == 1 else "labels have"
    advice = f"{len(rare)} {labels} fewer than {MIN_PER_LABEL} examples: add some, merge or drop them."
    return Hits(lines.max_lines, count, list(lines.of(rare))).finding("rare_labels", Severity.WARNING, file, advice)


def _imbalance(counts: Counter[str], file: FileParam) -> list[Finding]:
    """Against the median of the labels that are not rare: those are told of already."""
    common = [count for count in counts.values() if count >= MIN_PER_LABEL]
    if len(common) < 2:
        return []
    most, total = max(common), sum(common)
    ratio = most / median(common)
    if ratio <= MAX_IMBALANCE and not (len(common) == 2 and most > MAX_SHARE_OF_TWO * total):
        return []
    advice = f"The most frequent label stands on {most} of {total} examples: accuracy will flatter; add others."
    return [Finding("label_imbalance", Severity.WARNING, file, most, advice)]


def _variants(counts: Counter[str], lines: LabelLines, file: FileParam) -> list[Finding]:
    """Labels that differ in case, white space or punctuation only; the most frequent spelling counts as meant."""
    spellings: dict[str, list[str]] = {}
    for label, _ in counts.most_common():
        spellings.setdefault(re.sub(r"[\W_]+", "", label.casefold()) or label, []).append(label)
    odd = [label for group in spellings.values() for label in group[1:]]
    count = sum(counts[label] for label in odd)
    advice = "Spelled in two ways (case, spaces, punctuation), a label becomes two: choose one."
    return Hits(lines.max_lines, count, list(lines.of(odd))).finding("label_variants", Severity.WARNING, file, advice)
