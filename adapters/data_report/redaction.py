"""Excerpts that give nothing away: what is personal or secret is masked before anything is cut. Knows no check."""

from __future__ import annotations

from adapters.data_report.personal_data import PersonalData, Span
from adapters.data_report.secrets import Secrets

MASK = "•••"
KEPT_CHARACTERS = 2
EXCERPT_CHARACTERS = 120


class Redactor:
    def __init__(self, personal: PersonalData, secrets: Secrets) -> None:
        self._personal = personal
        self._secrets = secrets

    def mask(self, text: str) -> str:
        """The text with each value shortened to its first two characters and a mask."""
        return self._masked(text, 0)[0]

    def excerpt(self, text: str, focus: int = 0) -> str:
        """A masked piece of `text` on one line, around the character at `focus`."""
        masked, focus = self._masked(text, focus)
        start = max(0, min(focus - EXCERPT_CHARACTERS // 3, len(masked) - EXCERPT_CHARACTERS))
        piece = " ".join(masked[start : start + EXCERPT_CHARACTERS].split())
        before, after = start > 0, start + EXCERPT_CHARACTERS < len(masked)
        return ("…" if before else "") + piece + ("…" if after else "")

    def _masked(self, text: str, focus: int) -> tuple[str, int]:
        """Also where the character at `focus` has moved to."""
        spans = _united([*self._personal.spans(text), *self._secrets.spans(text)])
        parts, position, moved = [], 0, focus
        for span in spans:
            shown = text[span.start : span.start + KEPT_CHARACTERS] + MASK
            parts += [text[position : span.start], shown]
            position = span.stop
            if span.stop <= focus:
                moved += len(shown) - (span.stop - span.start)
            elif span.start < focus:
                moved -= focus - span.start
        return "".join([*parts, text[position:]]), moved


def _united(spans: list[Span]) -> list[Span]:
    """Overlapping ranges as one: no part of a value may stay because another find covers the rest."""
    united: list[Span] = []
    for span in sorted(spans):
        if united and span.start < united[-1].stop:
            last = united[-1]
            united[-1] = last._replace(stop=max(last.stop, span.stop))
        else:
            united.append(span)
    return united
