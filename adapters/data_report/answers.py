"""Answers that say nothing: placeholders, and refusals of an assistant. Knows single answers only."""

from __future__ import annotations

import re

from adapters.data_report.finding import FileParam, Finding, Severity
from adapters.data_report.hits import Hits, Limits
from adapters.data_report.outputs import MAX_LABEL_CHARACTERS
from adapters.data_report.redaction import Redactor
from adapters.data_report.row import Row
from adapters.refusals import find_refusal

USUAL_SHARE = 0.01

_PLACEHOLDERS = frozenset(
    "n/a|na|n.a.|null|nil|none|nan|undefined|todo|tbd|tba|fixme|xxx|empty|<empty>|[empty]|(empty)|placeholder"  # noqa: SIM905
    "|no answer|no response|not available|to be done|lorem ipsum".split("|")
)
_DASHES = re.compile(r"[-_.?\u2013\u2014\u2026\s]+\Z")


class AnswerCheck:
    def __init__(self, file: FileParam, limits: Limits, redactor: Redactor) -> None:
        self._file = file
        self._redactor = redactor
        self._placeholders: dict[str, Hits] = {}
        self._max_lines = limits.max_lines
        self._refusals = Hits(limits.max_lines)

    def add(self, row: Row) -> None:
        for answer in row.answers:
            if _is_placeholder(answer):
                self._placeholders.setdefault(answer.strip(), Hits(self._max_lines)).add(row.line)
                return
        for answer in row.answers:
            match = find_refusal(answer)
            if match is not None:
                self._refusals.add(row.line)
                if self._refusals.wants_excerpt:
                    self._refusals.excerpts.append(self._redactor.excerpt(answer, match.start()))
                return

    def findings(self, num_examples: int) -> list[Finding]:
        return [
            *self._placeholder_hits(num_examples).finding(
                "placeholder_answer",
                Severity.WARNING,
                self._file,
                "The answer says nothing: write one, or remove the line.",
            ),
            *self._refusals.finding(
                "refused_answer",
                Severity.WARNING,
                self._file,
                "An assistant refused, and the model would learn to: keep only refusals that are meant.",
            ),
        ]

    def _placeholder_hits(self, num_examples: int) -> Hits:
        """An answer such as `none` that is used often is a label of that name."""
        odd = [hits for hits in self._placeholders.values() if hits.count <= max(3, USUAL_SHARE * num_examples)]
        lines = sorted(line for hits in odd for line in hits.lines)[: self._max_lines]
        return Hits(self._max_lines, sum(hits.count for hits in odd), lines)


def _is_placeholder(answer: str) -> bool:
    text = answer.strip().casefold().rstrip("!")
    return len(text) <= MAX_LABEL_CHARACTERS and (text in _PLACEHOLDERS or bool(_DASHES.match(text)))
