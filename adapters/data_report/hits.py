"""Lines that one fault was found on, while a file streams by. Keeps the first ones only."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapters.data_report.finding import MAX_EXCERPTS, FileParam, Finding, Severity


@dataclass(frozen=True)
class Limits:
    """What bounds a report's memory and time.

    Examples beyond `max_examples` are still parsed, compared exactly and counted, but no longer read for what takes
    time: tokens, languages, personal data, near duplicates. The report then says so (`partly_checked`).
    """

    max_lines: int = 100
    """Line numbers a finding lists."""
    max_examples: int = 200_000
    max_compared_characters: int = 64 * 1024 * 1024
    """Text kept to compare near duplicates in."""


@dataclass
class Hits:
    """Counts lines; lists the first `max_lines` of them and the first excerpts."""

    max_lines: int
    count: int = 0
    lines: list[int] = field(default_factory=list)
    excerpts: list[str] = field(default_factory=list)

    def add(self, line: int) -> None:
        self.count += 1
        if len(self.lines) < self.max_lines:
            self.lines.append(line)

    @property
    def wants_excerpt(self) -> bool:
        return len(self.excerpts) < MAX_EXCERPTS

    def finding(self, code: str, severity: Severity, file: FileParam, advice: str) -> list[Finding]:
        """Nothing where nothing was hit."""
        if not self.count:
            return []
        return [Finding(code, severity, file, self.count, advice, tuple(self.lines), tuple(self.excerpts))]
