"""Personal data and secrets of a file, counted by kind. The recognisers are elsewhere; knows what to say of them."""

from __future__ import annotations

from typing import Any

from adapters.data_report.finding import FileParam, Finding, Severity
from adapters.data_report.hits import Hits, Limits
from adapters.data_report.personal_data import PersonalData
from adapters.data_report.redaction import Redactor
from adapters.data_report.row import Row
from adapters.data_report.secrets import Secrets

_WORDS = {
    "email": "E-mail addresses",
    "phone": "Telephone numbers",
    "card": "Payment card numbers",
    "iban": "Bank account numbers",
    "national_id": "Social security numbers",
    "ip_address": "Public IP addresses",
}


class ExposureCheck:
    """A line counts once for each kind."""

    def __init__(
        self, file: FileParam, limits: Limits, personal: PersonalData, secrets: Secrets, redactor: Redactor
    ) -> None:
        self._file = file
        self._personal = personal
        self._secrets = secrets
        self._redactor = redactor
        self._hits = {kind: Hits(limits.max_lines) for kind in (*PersonalData.kinds, "secret")}

    def add(self, row: Row) -> None:
        seen: set[str] = set()
        for _, text in row.texts:
            for span in (*self._personal.spans(text), *self._secrets.spans(text)):
                if span.kind not in seen:
                    seen.add(span.kind)
                    self._hits[span.kind].add(row.line)
                    if self._hits[span.kind].wants_excerpt:
                        self._hits[span.kind].excerpts.append(self._redactor.excerpt(text, span.start))

    def findings(self) -> list[Finding]:
        found = self._hits["secret"].finding(
            "secret",
            Severity.ERROR,
            self._file,
            "Keys or passwords: a model can recite what it was trained on. Remove them, and revoke them.",
        )
        for kind, words in _WORDS.items():
            advice = f"{words}: replace them by invented ones, unless you may train on them and the answers need them."
            found += self._hits[kind].finding(f"pii_{kind}", Severity.WARNING, self._file, advice)
        return found

    def statistics(self) -> dict[str, Any]:
        return {kind: hits.count for kind, hits in self._hits.items() if hits.count}
