"""Streams a training file, and a validation file, through all checks into one report. Knows no tenant and no job.

Memory is bounded by `Limits`, plus 28 bytes an example. Each file is read once, and once more for the excerpts of
findings that are known only at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from adapters.corpus import Codec
from adapters.data_report.answers import AnswerCheck
from adapters.data_report.duplicates import conflicting_outputs, exact_duplicates, exact_overlap
from adapters.data_report.exposure import ExposureCheck
from adapters.data_report.finding import MAX_EXCERPTS, DataReport, FileParam, Finding, Severity
from adapters.data_report.format import FormatCheck
from adapters.data_report.hits import Hits, Limits
from adapters.data_report.keys import KeyColumns
from adapters.data_report.labels import LabelLines, json_findings, label_findings, label_statistics, unknown_labels
from adapters.data_report.languages import LanguageCheck, Languages
from adapters.data_report.lengths import LengthCheck
from adapters.data_report.near_duplicates import NearDuplicates
from adapters.data_report.outputs import OutputKind, Outputs
from adapters.data_report.personal_data import PersonalData
from adapters.data_report.redaction import Redactor
from adapters.data_report.representativeness import Sample, distance
from adapters.data_report.role_text import RoleTextCheck
from adapters.data_report.row import Row
from adapters.data_report.secrets import Secrets
from adapters.dataset import MIN_EXAMPLES, BadLine, examples_at, read_lines
from adapters.example import parse_learned

Source = Callable[[], AbstractContextManager[BinaryIO]]
"""Opens a file from its beginning."""

NEAR_OVERLAP_SHARE = 0.05
_ORDER = (Severity.ERROR, Severity.WARNING, Severity.INFO)


@dataclass(frozen=True)
class Base:
    """What a report needs of a base: its tokenizer, how long an example may be, which texts are its control tokens."""

    codec: Codec
    max_length: int
    control_tokens: Collection[str] = ()


@dataclass(frozen=True)
class Tools:
    """The recognisers, which take time to make and none to share."""

    personal: PersonalData
    secrets: Secrets
    languages: Languages
    redactor: Redactor

    @classmethod
    def make(cls) -> Tools:
        personal, secrets = PersonalData(), Secrets()
        return cls(personal, secrets, Languages(), Redactor(personal, secrets))


def make_report(
    training: Source,
    validation: Source | None = None,
    *,
    base: Base | None = None,
    limits: Limits | None = None,
    tools: Tools | None = None,
    breathe: Callable[[], None] = lambda: None,
) -> DataReport:
    """Never raises about the files' content: that is what the findings are for.

    `tools` may be shared by reports that are made one after another. Without a `base` nothing is said of tokens.
    `breathe` is called for each line and each part of what takes long, so that a caller can yield the processor, or
    stop by raising.
    """
    limits, tools = limits or Limits(), tools or Tools.make()
    train = _FileReport("training_file", limits, tools, base, breathe)
    train.read(training)
    findings = train.findings(training)
    statistics: dict[str, Any] = {"training": train.statistics()}
    if validation is not None:
        valid = _FileReport("validation_file", limits, tools, base, breathe, trained=train)
        valid.read(validation)
        far = distance(train.sample, valid.sample, breathe)
        across = [
            *exact_overlap(train.keys, valid.keys, limits.max_lines),
            *valid.near_overlap(),
            *unknown_labels(train.outputs, valid.outputs, valid.label_lines),
            *(far.findings() if far else ()),
        ]
        findings += valid.with_excerpts(across, validation) + valid.findings(validation)
        statistics |= {"validation": valid.statistics(), "representativeness": far.as_dict() if far else None}
    findings.sort(key=lambda finding: _ORDER.index(finding.severity))
    return DataReport(tuple(findings), statistics)


class _FileReport:
    """The checks of one file. One that follows a training file compares itself with that."""

    def __init__(
        self,
        file: FileParam,
        limits: Limits,
        tools: Tools,
        base: Base | None,
        breathe: Callable[[], None],
        trained: _FileReport | None = None,
    ) -> None:
        self._file, self._limits, self._tools, self._breathe = file, limits, tools, breathe
        self._trained = trained
        self._format = FormatCheck(file, limits, tools.redactor, MIN_EXAMPLES if trained is None else 1)
        self.keys, self.outputs = KeyColumns(), Outputs(limits.max_lines)
        self.label_lines = LabelLines(limits.max_lines)
        self.sample = Sample(file.encode())
        self._near, self._near_hits = NearDuplicates(limits), Hits(limits.max_lines)
        self._near_trained = Hits(limits.max_lines)
        self._twins: dict[int, int] = {}
        self._answers = AnswerCheck(file, limits, tools.redactor)
        self._languages = LanguageCheck(file, limits, tools.languages, tools.redactor)
        self._exposure = ExposureCheck(file, limits, tools.personal, tools.secrets, tools.redactor)
        tokens = base.control_tokens if base else ()
        self._role_text = RoleTextCheck(file, limits, tools.redactor, tokens)
        self._lengths = LengthCheck(file, limits, base.codec, base.max_length, tools.redactor) if base else None

    def read(self, source: Source) -> None:
        with source() as stream:
            for item in read_lines(stream, parse_learned):
                self._breathe()
                if isinstance(item, BadLine):
                    self._format.add_bad(item)
                    continue
                self._format.add_example()
                self._add(Row.of(item))
        self._take_pairs(self._near.settle())

    def _add(self, row: Row) -> None:
        self.keys.add(row)
        self.outputs.add(row)
        self.label_lines.add(row, self.outputs)
        self.sample.add(row)
        if len(self.keys) > self._limits.max_examples:
            return
        self._answers.add(row)
        self._role_text.add(row)
        self._languages.add(row)
        self._exposure.add(row)
        if self._lengths is not None:
            self._lengths.add(row)
        self._take_pairs(self._near.add(row))
        if self._trained is not None and self._trained._near.twin(row) is not None:
            self._near_trained.add(row.line)

    def _take_pairs(self, pairs: list[tuple[int, int]]) -> None:
        for line, earlier in pairs:
            self._near_hits.add(line)
            if len(self._near_hits.lines) <= MAX_EXCERPTS:
                self._twins[line] = earlier

    def findings(self, source: Source) -> list[Finding]:
        num, max_lines, kind = len(self.keys), self._limits.max_lines, self.outputs.kind
        found = self._format.findings()
        if not num:
            return found
        found += exact_duplicates(self.keys, self._file, max_lines)
        found += self._near_hits.finding(
            "near_duplicates",
            Severity.WARNING,
            self._file,
            "Almost the same as an earlier line, with almost the same answer: keep one of each.",
        )
        found += conflicting_outputs(self.keys, kind, self._file, max_lines)
        if kind is OutputKind.LABELS and self._trained is None:
            found += label_findings(self.outputs, self.label_lines, self._file)
        if kind is OutputKind.JSON:
            found += json_findings(self.outputs, self._file)
        found += [*self._answers.findings(num), *self._role_text.findings(num)]
        found += [*self._languages.findings(), *self._exposure.findings()]
        found += self._lengths.findings() if self._lengths else []
        return self.with_excerpts([*found, *self._partly_checked()], source)

    def near_overlap(self) -> list[Finding]:
        """Validation lines that are almost a training line, and not the same input."""
        share = self._near_trained.count / max(1, len(self.keys))
        return self._near_trained.finding(
            "validation_near_overlap",
            Severity.WARNING if share >= NEAR_OVERLAP_SHARE else Severity.INFO,
            "validation_file",
            f"{share:.1%} of the validation examples are almost training examples: results will flatter.",
        )

    def with_excerpts(self, findings: list[Finding], source: Source) -> list[Finding]:
        """Masked beginnings of the first lines of findings that have no excerpts of their own."""
        bare = [finding for finding in findings if finding.lines and not finding.excerpts]
        wanted = {line for finding in bare for line in finding.lines[:MAX_EXCERPTS]}
        if not wanted:
            return findings
        texts = dict(self._excerpts(source, wanted))
        twins = {line: f"like line {earlier}: " for line, earlier in self._twins.items()}

        def illustrated(finding: Finding) -> Finding:
            prefixes = twins if finding.code == "near_duplicates" else {}
            shown = (prefixes.get(line, "") + texts[line] for line in finding.lines[:MAX_EXCERPTS])
            return replace(finding, excerpts=tuple(shown)) if finding in bare else finding

        return [illustrated(finding) for finding in findings]

    def _excerpts(self, source: Source, lines: Collection[int]) -> Iterator[tuple[int, str]]:
        with source() as stream:
            for example in examples_at(stream, lines, parse_learned):
                row = Row.of(example)
                excerpt = self._tools.redactor.excerpt
                yield row.line, f"{excerpt(row.question)} → {excerpt(row.answer)}"

    def _partly_checked(self) -> list[Finding]:
        num_left_out = len(self.keys) - self._limits.max_examples
        if num_left_out <= 0:
            return []
        advice = f"Only the first {self._limits.max_examples} examples were read for everything: report on parts."
        return [Finding("partly_checked", Severity.INFO, self._file, num_left_out, advice)]

    def statistics(self) -> dict[str, Any]:
        counts = self._format.statistics()
        if not len(self.keys):
            return counts
        kind = self.outputs.kind
        labels = label_statistics(self.outputs.counts, self._tools.redactor.mask) if kind is OutputKind.LABELS else None
        return {
            **counts,
            "outputs": kind.value,
            "labels": labels,
            "tokens": self._lengths.statistics() if self._lengths else None,
            "languages": self._languages.statistics(),
            "exposed": self._exposure.statistics(),
        }
