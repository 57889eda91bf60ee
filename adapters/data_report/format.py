"""Lines that are no examples, every one of them. Knows the parser's complaints, not the examples."""

from __future__ import annotations

from adapters.data_report.finding import FileParam, Finding, Severity
from adapters.data_report.hits import Hits, Limits
from adapters.data_report.redaction import Redactor
from adapters.dataset import BadLine

MAX_MESSAGES = 20


class FormatCheck:
    """Messages missing their text are told apart from lines that are malformed."""

    def __init__(self, file: FileParam, limits: Limits, redactor: Redactor, minimum: int) -> None:
        self._file = file
        self._redactor = redactor
        self._minimum = minimum
        self._num_examples = 0
        self._malformed, self._empty = Hits(limits.max_lines), Hits(limits.max_lines)

    def add_example(self) -> None:
        self._num_examples += 1

    def add_bad(self, bad: BadLine) -> None:
        hits = self._empty if bad.message.endswith(" is empty") else self._malformed
        hits.add(bad.line)
        if len(hits.excerpts) < MAX_MESSAGES:
            hits.excerpts.append(f"line {bad.line}: {self._redactor.mask(bad.message)}")

    def findings(self) -> list[Finding]:
        found = [
            *self._malformed.finding(
                "format_error",
                Severity.ERROR,
                self._file,
                "Mend or remove these lines: a job refuses the file as it is.",
            ),
            *self._empty.finding(
                "empty_text", Severity.ERROR, self._file, "Write the missing prompt or answer, or remove the line."
            ),
        ]
        if self._num_examples < self._minimum:
            advice = f"At least {self._minimum} examples are needed."
            found.append(Finding("too_few_examples", Severity.ERROR, self._file, self._num_examples, advice))
        return found

    def statistics(self) -> dict[str, int]:
        return {
            "num_examples": self._num_examples,
            "num_bad_lines": self._malformed.count + self._empty.count,
        }
