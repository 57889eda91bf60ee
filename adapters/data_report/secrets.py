"""Finds keys, tokens and passwords in a text, by detect-secrets' recognisers of one vendor's form each.

Its detectors of high entropy are left out: they take hashes and identifiers, which data sets are full of, for secrets.
Nothing is verified with a vendor; nothing leaves the process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from detect_secrets.plugins.artifactory import ArtifactoryDetector
from detect_secrets.plugins.aws import AWSKeyDetector
from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
from detect_secrets.plugins.base import RegexBasedDetector
from detect_secrets.plugins.basic_auth import BasicAuthDetector
from detect_secrets.plugins.discord import DiscordBotTokenDetector
from detect_secrets.plugins.github_token import GitHubTokenDetector
from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
from detect_secrets.plugins.jwt import JwtTokenDetector
from detect_secrets.plugins.keyword import CONFIG_DENYLIST_REGEX_TO_GROUP, KeywordDetector
from detect_secrets.plugins.mailchimp import MailchimpDetector
from detect_secrets.plugins.npm import NpmDetector
from detect_secrets.plugins.openai import OpenAIDetector
from detect_secrets.plugins.private_key import PrivateKeyDetector
from detect_secrets.plugins.pypi_token import PypiTokenDetector
from detect_secrets.plugins.sendgrid import SendGridDetector
from detect_secrets.plugins.slack import SlackDetector
from detect_secrets.plugins.square_oauth import SquareOAuthDetector
from detect_secrets.plugins.stripe import StripeDetector
from detect_secrets.plugins.telegram_token import TelegramBotTokenDetector
from detect_secrets.plugins.twilio import TwilioKeyDetector

from adapters.data_report.personal_data import Span, separate

MIN_PASSWORD_LENGTH = 6

_BORDER = re.compile(r"[\s\"'<>(),;`]")

_KEY_BLOCK = re.compile(
    r"(?:-{2,}\s*)?BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?.*?(?:END [A-Z0-9 ]*PRIVATE KEY.*?-{2,}|\Z)", re.S
)


class NewerTokenDetector(RegexBasedDetector):
    """Forms that came after detect-secrets' last release: model vendors' keys, Google's, GitHub's fine-grained."""

    secret_type = "Vendor token"
    denylist = (
        re.compile(r"(?<!\w)sk-(?:proj|svcacct|admin)-[A-Za-z0-9_-]{32,}"),
        re.compile(r"(?<!\w)sk-ant-[A-Za-z0-9_-]{32,}"),
        re.compile(r"(?<!\w)sk-[A-Za-z0-9]{40,}"),
        re.compile(r"(?<!\w)hf_[A-Za-z0-9]{30,}"),
        re.compile(r"(?<!\w)AIza[A-Za-z0-9_-]{35}"),
        re.compile(r"(?<!\w)github_pat_[A-Za-z0-9_]{50,}"),
        re.compile(r"(?<!\w)rs-[A-Za-z0-9_-]{32,}"),
    )


class Secrets:
    """The recognisers; make one and use it for many texts."""

    def __init__(self) -> None:
        self._detectors: tuple[RegexBasedDetector, ...] = tuple(
            detector()
            for detector in (
                ArtifactoryDetector,
                AWSKeyDetector,
                AzureStorageKeyDetector,
                BasicAuthDetector,
                DiscordBotTokenDetector,
                GitHubTokenDetector,
                GitLabTokenDetector,
                JwtTokenDetector,
                MailchimpDetector,
                NewerTokenDetector,
                NpmDetector,
                OpenAIDetector,
                PypiTokenDetector,
                SendGridDetector,
                SlackDetector,
                SquareOAuthDetector,
                StripeDetector,
                TelegramBotTokenDetector,
                TwilioKeyDetector,
            )
        )
        self._keywords, self._private_keys = KeywordDetector(), PrivateKeyDetector()

    def spans(self, text: str) -> list[Span]:
        """In order, not overlapping."""
        return separate([*self._tokens(text), *self._passwords(text), *self._key_blocks(text)])

    def _tokens(self, text: str) -> Iterator[Span]:
        """What a vendor's pattern matches, grown to the whole word: a pattern may stop short, or name a part only."""
        for detector in self._detectors:
            if any(True for _ in detector.analyze_string(text)):
                for pattern in detector.denylist:
                    for match in pattern.finditer(text):
                        yield _whole_word(text, *match.span())

    def _passwords(self, text: str) -> Iterator[Span]:
        for values in (
            self._keywords.analyze_string(text),
            self._keywords.analyze_string(text, CONFIG_DENYLIST_REGEX_TO_GROUP),
        ):
            for value in values:
                if value and _is_password(value):
                    for match in re.finditer(re.escape(value), text):
                        yield _whole_word(text, *match.span())

    def _key_blocks(self, text: str) -> Iterator[Span]:
        if any(True for _ in self._private_keys.analyze_string(text)):
            for match in _KEY_BLOCK.finditer(text):
                yield Span(*match.span(), "secret")


def _whole_word(text: str, start: int, stop: int) -> Span:
    while start > 0 and not _BORDER.match(text[start - 1]):
        start -= 1
    while stop < len(text) and not _BORDER.match(text[stop]):
        stop += 1
    return Span(start, stop, "secret")


def _is_password(value: str) -> bool:
    """Behind `password:` there may stand any word; one of letters and something else is hardly a word."""
    has_letter = any(map(str.isalpha, value))
    return len(value) >= MIN_PASSWORD_LENGTH and has_letter and any(map(str.isdigit, value)) and len(set(value)) > 3
