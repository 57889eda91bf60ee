"""What a data report says: findings and statistics, as frozen values. Knows no check and no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

FileParam = Literal["training_file", "validation_file"]

MAX_EXCERPTS = 3
REPORT_VERSION = 1


class Severity(StrEnum):
    """ERROR: do not train on this. WARNING: probably a mistake. INFO: worth knowing, often meant so."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True)
class Finding:
    """One kind of fault in one file.

    `count` is how many lines (or labels, or pairs) it concerns, `lines` the first of them (1-based), `excerpts` a few
    pieces of text in which everything personal or secret is masked.
    """

    code: str
    severity: Severity
    file: FileParam
    count: int
    advice: str
    lines: tuple[int, ...] = ()
    excerpts: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "severity": self.severity.value,
            "file": self.file,
            "count": self.count,
            "lines": list(self.lines),
            "advice": self.advice,
            "excerpts": list(self.excerpts),
        }

    def describe(self) -> str:
        """One line for an event or an error: how many, what, where."""
        shown = ", ".join(map(str, self.lines[:5])) + (", …" if len(self.lines) > 5 else "")
        noun = "line" if len(self.lines) == 1 else "lines"
        where = f" ({noun} {shown})" if self.lines else ""
        file = "" if self.file == "training_file" else " in the validation file"
        return f"{self.code.replace('_', ' ')}: {self.count}{file}{where}. {self.advice}"


@dataclass(frozen=True)
class DataReport:
    """The findings, the gravest first, and what was counted on the way."""

    findings: tuple[Finding, ...]
    statistics: Mapping[str, Any] = field(default_factory=dict)

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity is severity)

    @property
    def has_errors(self) -> bool:
        return bool(self.of(Severity.ERROR))

    def summary(self) -> str:
        words = ((Severity.ERROR, "error"), (Severity.WARNING, "warning"), (Severity.INFO, "note"))
        counts = ((len(self.of(severity)), word) for severity, word in words)
        return "Data report: " + ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts)

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "version": REPORT_VERSION,
            "num_errors": len(self.of(Severity.ERROR)),
            "num_warnings": len(self.of(Severity.WARNING)),
            "num_notes": len(self.of(Severity.INFO)),
            "findings": [finding.as_dict() for finding in self.findings],
            "statistics": dict(self.statistics),
        }
