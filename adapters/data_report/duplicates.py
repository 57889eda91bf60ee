"""Examples that occur twice, and inputs that come with different outputs. Works on keys; knows no text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapters.data_report.finding import FileParam, Finding, Severity
from adapters.data_report.keys import KeyColumns, repeated
from adapters.data_report.outputs import OutputKind

SYSTEMATIC_SHARE = 0.05
"""When so many of the distinct inputs have several free-text outputs, the file is taken to mean it."""

MAX_OVERLAP_SHARE = 0.1


def exact_duplicates(columns: KeyColumns, file: FileParam, max_lines: int) -> list[Finding]:
    """Lines that repeat an earlier one's texts byte for byte; the first occurrence is not among them."""
    lines = columns.lines[repeated(columns.exact)]
    if not len(lines):
        return []
    advice = "Each is trained on again at every pass: remove the copies, unless the weight is meant."
    return [Finding("exact_duplicates", Severity.WARNING, file, len(lines), advice, _first(lines, max_lines))]


def conflicting_outputs(columns: KeyColumns, kind: OutputKind, file: FileParam, max_lines: int) -> list[Finding]:
    """Lines whose input, but for case, white space and its last marks, stands elsewhere with another output.

    A label or a JSON object contradicts another; a free text may just be another way to say it, so there a file in
    which that is common is not complained about.
    """
    conflicted = _conflicted(columns)
    lines = columns.lines[conflicted]
    if not len(lines):
        return []
    inputs = columns.input
    share = len(np.unique(inputs[conflicted])) / len(np.unique(inputs))
    if kind is OutputKind.TEXT and share > SYSTEMATIC_SHARE:
        severity, code = Severity.INFO, "several_outputs"
        advice = "Many inputs have several outputs. Fine if variety is wanted; the loss cannot fall to zero."
    else:
        severity, code = Severity.WARNING, "conflicting_outputs"
        advice = "The same input asks for different outputs: decide which one is right."
    return [Finding(code, severity, file, len(lines), advice, _first(lines, max_lines))]


def exact_overlap(train: KeyColumns, valid: KeyColumns, max_lines: int) -> list[Finding]:
    """Validation lines whose input is trained on. ERROR from a tenth of the validation file on: it measures memory."""
    shared = np.isin(valid.input, train.input)
    lines = valid.lines[shared]
    if not len(lines):
        return []
    share = len(lines) / len(valid)
    severity = Severity.ERROR if share >= MAX_OVERLAP_SHARE else Severity.WARNING
    advice = f"{share:.1%} of the validation inputs are trained on: remove them from one of the files."
    found = Finding("validation_overlap", severity, "validation_file", len(lines), advice, _first(lines, max_lines))
    return [found]


def _conflicted(columns: KeyColumns) -> NDArray[np.bool_]:
    """Which examples share their input key with an example of another answer key: bool [n]."""
    _, group = np.unique(columns.input, return_inverse=True)
    answers = columns.answer
    order = np.lexsort((answers, group))
    same_group = group[order][1:] == group[order][:-1]
    differs = same_group & (answers[order][1:] != answers[order][:-1])
    return np.isin(group, group[order][1:][differs])


def _first(lines: NDArray[np.uint32], count: int) -> tuple[int, ...]:
    return tuple(lines[:count].tolist())
