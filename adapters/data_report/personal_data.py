"""Finds personal data in a text: addresses, numbers of phones, cards, accounts and people. Knows no file.

Telephone numbers are recognised by `phonenumbers`, public IP addresses by `detect-secrets`; what carries a checksum
is believed only when that is right. Names are not looked for: that takes a model, and finds brands and places.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from detect_secrets.plugins.ip_public import IPPublicDetector
from phonenumbers import Leniency, PhoneNumberMatcher

MIN_PHONE_DIGITS = 7
NATIONAL_REGIONS = ("US", "GB", "DE", "FR", "ES", "IT", "IN")
"""Where a number without a country's prefix is tried, when a word beside it says that it is one; the first always."""

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[^\W\d_]{2,24}(?![\w-])")
_RESERVED = re.compile(r"(?:[@.])example\.(?:com|org|net|edu)\Z|\.(?:test|invalid|example|localhost)\Z", re.IGNORECASE)
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
_ISSUERS = re.compile(r"4|5[1-5]|2(?:2[2-9]|[3-6]|7[01]|720)|3[47]|3[068]|35|60|6[245]")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
_SSN = re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
_PHONE_CUE = re.compile(
    r"phone|mobile|\bcell\b|\bcall\b|\btel\b|\btel[.:]|\bring\b|whatsapp|telef|handy|portable|m[oó]vil", re.IGNORECASE
)


class Span(NamedTuple):
    """Half-open range of a text, and what stands there."""

    start: int
    stop: int
    kind: str


class PersonalData:
    """The recognisers; make one and use it for many texts."""

    kinds = ("email", "phone", "card", "iban", "national_id", "ip_address")

    def __init__(self) -> None:
        self._addresses = IPPublicDetector()

    def spans(self, text: str) -> list[Span]:
        """In order, not overlapping: a longer find swallows a shorter one."""
        has_digits = any(character.isdigit() for character in text)
        if not has_digits:
            return list(_emails(text)) if "@" in text else []
        found = [*_emails(text), *_cards(text), *_ibans(text), *_national_ids(text), *_phones(text)]
        return separate([*found, *self._ips(text)])

    def _ips(self, text: str) -> Iterator[Span]:
        if text.count(".") >= 3:
            for value in self._addresses.analyze_string(text):
                start = text.find(value)
                yield Span(start, start + len(value), "ip_address")


def separate(spans: list[Span]) -> list[Span]:
    """Without those that overlap a longer one."""
    kept: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start - span.stop, span.start)):
        if all(span.stop <= other.start or other.stop <= span.start for other in kept):
            kept.append(span)
    return sorted(kept)


def _emails(text: str) -> Iterator[Span]:
    for match in _EMAIL.finditer(text):
        if not _RESERVED.search(match.group()):
            yield Span(*match.span(), "email")


def _cards(text: str) -> Iterator[Span]:
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        if _ISSUERS.match(digits) and len(set(digits)) > 2 and _luhn(digits):
            yield Span(*match.span(), "card")


def _ibans(text: str) -> Iterator[Span]:
    for match in _IBAN.finditer(text):
        value = match.group().replace(" ", "")
        if 15 <= len(value) <= 34 and _mod_97(value) == 1:
            yield Span(*match.span(), "iban")


def _national_ids(text: str) -> Iterator[Span]:
    for match in _SSN.finditer(text):
        yield Span(*match.span(), "national_id")


def _phones(text: str) -> Iterator[Span]:
    if sum(character.isdigit() for character in text) < MIN_PHONE_DIGITS:
        return
    cued = bool(_PHONE_CUE.search(text))
    for region in NATIONAL_REGIONS if cued else NATIONAL_REGIONS[:1]:
        for match in PhoneNumberMatcher(text, region, leniency=Leniency.VALID):
            # Ten digits in a row may be anything; a number that is written as one, or announced, is one.
            if cued or match.raw_string.startswith("+") or not match.raw_string.isdigit():
                yield Span(match.start, match.end, "phone")


def _luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    doubled = (int(digit) * (1 + index % 2) for index, digit in enumerate(reversed(digits)))
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _mod_97(iban: str) -> int:
    """ISO 13616: the account's letters as numbers, the first four characters last."""
    return int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97
