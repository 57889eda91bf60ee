"""Which languages a file is in, and lines in another one. py3langid's naive Bayes over byte n-grams, 139 languages.

Its model comes with the wheel. Short texts are hard for any method: only confident judgements on enough letters count.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from adapters.data_report.finding import FileParam, Finding, Severity
from adapters.data_report.hits import Hits, Limits
from adapters.data_report.redaction import Redactor
from adapters.data_report.row import Row

MIN_LETTERS = 20
MIN_DENSE_LETTERS = 6
"""Where a letter is a syllable or a word: Chinese, Japanese, Korean."""
MIN_CONFIDENCE = 0.75
MAX_DOUBT = 0.03
"""A line is in another language only if the file's main one is as unlikely as this: names are often foreign."""
MAX_CHARACTERS = 600
MIN_JUDGED = 20
MIN_JUDGED_SHARE = 0.2
FOREIGN_SHARE = 0.05
"""A language on fewer lines than this share is taken for a slip, on more for a part of the data."""

NO_LANGUAGE = "zxx"
_ALIKE = tuple(
    frozenset(group.split())
    for group in ("bs hr sr sl mk bg", "no da nn sv", "en pcm", "id ms", "gl pt es ca", "cs sk", "af nl fy")
)


class Languages:
    """The identifier; make one and use it for many texts."""

    def __init__(self) -> None:
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def of(self, text: str, usual: str | None = None) -> str | None:
        """An ISO 639 code, or None where it is too hard to tell, or to tell from the `usual` language."""
        text = text[:MAX_CHARACTERS]
        num_letters = sum(character.isalpha() for character in text)
        num_dense = sum(character > "\u2e7f" for character in text)
        if num_letters < MIN_LETTERS and num_dense < MIN_DENSE_LETTERS:
            return None
        language, confidence = self._identifier.classify(text)
        if confidence < MIN_CONFIDENCE or language == NO_LANGUAGE:
            return None
        if usual not in (None, language) and dict(self._identifier.rank(text))[usual] > MAX_DOUBT:
            return None
        return str(language)


class LanguageCheck:
    """Inputs and answers are judged apart: a translator's are in two languages."""

    def __init__(self, file: FileParam, limits: Limits, languages: Languages, redactor: Redactor) -> None:
        self._file = file
        self._max_lines = limits.max_lines
        self._languages = languages
        self._redactor = redactor
        self._num = 0
        self._sides = {"input": _Side(), "answer": _Side()}

    def add(self, row: Row) -> None:
        self._num += 1
        for name, text in (("input", row.question), ("answer", row.answer)):
            side = self._sides[name]
            language = self._languages.of(text, side.main)
            if language is not None:
                side.add(language, row.line, text, self._max_lines)

    def findings(self) -> list[Finding]:
        found: list[Finding] = []
        for name, side in self._sides.items():
            if side.num_judged >= max(MIN_JUDGED, MIN_JUDGED_SHARE * self._num):
                found += self._of(name, side)
        return found

    def statistics(self) -> dict[str, Any]:
        return {name: dict(side.counts.most_common(10)) for name, side in self._sides.items()}

    def _of(self, name: str, side: _Side) -> list[Finding]:
        main = side.main
        assert main is not None
        others = [language for language in side.counts if language != main and not _alike(language, main)]
        rare = [language for language in others if side.counts[language] < FOREIGN_SHARE * side.num_judged]
        count = sum(side.counts[language] for language in rare)
        lines = sorted(line for language in rare for line in side.lines[language])[: self._max_lines]
        texts = [side.first_text[language] for language in rare[:3]]
        hits = Hits(self._max_lines, count, lines, [self._redactor.excerpt(text) for text in texts])
        advice = f"Almost every {name} is in '{main}', these are in {', '.join(map(repr, sorted(rare)[:8]))}."
        found = hits.finding(f"foreign_{name}", Severity.WARNING, self._file, advice)
        common = [language for language in others if language not in rare]
        if common:
            advice = f"The {name}s are in {', '.join(map(repr, [main, *common]))}: evaluate each language on its own."
            count = sum(side.counts[language] for language in common)
            found.append(Finding(f"mixed_languages_{name}", Severity.INFO, self._file, count, advice))
        return found


class _Side:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.lines: dict[str, list[int]] = {}
        self.first_text: dict[str, str] = {}

    @property
    def num_judged(self) -> int:
        return self.counts.total()

    @property
    def main(self) -> str | None:
        """The most frequent so far."""
        return max(self.counts, key=self.counts.__getitem__, default=None)

    def add(self, language: str, line: int, text: str, max_lines: int) -> None:
        self.counts[language] += 1
        lines = self.lines.setdefault(language, [])
        if len(lines) < max_lines:
            lines.append(line)
            self.first_text.setdefault(language, text)


def _alike(one: str, other: str) -> bool:
    """Too close to be told apart in a sentence."""
    return any(one in group and other in group for group in _ALIKE)
