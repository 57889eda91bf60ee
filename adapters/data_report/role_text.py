"""Text that plays another role than its message's: control tokens, invented turns, orders to forget the orders.

Knows patterns and the base's own control tokens; whether an attack was meant, only a person can tell.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from adapters.data_report.finding import FileParam, Finding, Severity
from adapters.data_report.hits import Hits, Limits
from adapters.data_report.redaction import Redactor
from adapters.data_report.row import Row

CONVENTION_SHARE = 0.2
"""Role headers on so many lines are how the prompts are written."""

_TOKENS = re.compile(
    r"""
    <\|[A-Za-z][\w-]{1,40}\|> | <\|im_(?:start|end)\| | <\|?(?:begin|end)_of_text\|?> | <(?:start|end)_of_turn>
    | \[/?INST\] | <</?SYS>> | \[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS)\] | <\uff5c[\w\u2581]{2,40}\uff5c>
    """,
    re.VERBOSE,
)
_HEADER = re.compile(
    r"""
    ^[ \t]* (?:\#{1,4}[ \t]* | \*\* | < | \[)?
    (?:system|assistant|user|human|ai|instruction|response|developer) (?:[ ](?:prompt|message))?
    (?:\*\*|>|\])? [ \t]* (?: : | $)
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_BARE = re.compile(r"\s*\w+\s*\Z")
"""A whole text of one word is a label, no header."""

_ORDERS = re.compile(
    r"""
    \b(?:ignore|disregard|forget|override|bypass|overlook)\b (?:\ \w+){0,3}?
      \ (?:previous|prior|above|earlier|preceding|foregoing|system|your|original|all)\b (?:\ \w+){0,3}?
      \ (?:instructions?|prompts?|directions?|directives?|rules|guidelines|programming|guardrails)\b
    | \byou\ are\ (?:now|from\ now\ on)\ (?:\w+\ ){0,3}?(?:DAN|jailbroken|unrestricted|uncensored|in\ developer\ mode)\b
    | \b(?:reveal|print|repeat|show|output|leak|tell\ me)\b\ (?:\w+\ ){0,3}?
      (?:system|initial|hidden|secret)\ (?:prompt|instructions|message)\b
    | \bnew\ (?:system\ )?instructions?:
    | \b(?:ignorier\w*|vergiss|vergessen\ sie|missachte\w*)\b\ (?:\w+\ ){0,3}?
      (?:vorherig\w+|bisherig\w+|obig\w+|frühere\w+)\ (?:anweisung\w*|regeln|befehle?)\b
    | \b(?:ignor\w+|oubli\w+)\ (?:\w+\ ){0,3}?
      (?:instructions?|consignes|règles)\ (?:précédente?s?|antérieure?s?|ci-dessus)
    | \b(?:ignor[ae]|olvid[ae])\b\ (?:\w+\ ){0,3}?instrucciones\ (?:anteriores|previas)
    """,
    re.IGNORECASE | re.VERBOSE,
)


class RoleTextCheck:
    def __init__(
        self, file: FileParam, limits: Limits, redactor: Redactor, control_tokens: Collection[str] = ()
    ) -> None:
        """`control_tokens` are the base's own: texts that its tokenizer turns into one token each."""
        self._file = file
        self._redactor = redactor
        own = sorted((token for token in control_tokens if re.search(r"\W", token.strip())), key=len, reverse=True)
        self._own = re.compile("|".join(map(re.escape, own))) if own else None
        names = ("own", "token", "header", "order")
        self._hits = {name: Hits(limits.max_lines) for name in names}

    def add(self, row: Row) -> None:
        own = self._own is not None and self._search("own", self._own, row)
        if not own:
            self._search("token", _TOKENS, row)
        self._search("order", _ORDERS, row)
        self._search("header", _HEADER, row)

    def findings(self, num_examples: int) -> list[Finding]:
        headers = self._hits["header"]
        usual = headers.count > CONVENTION_SHARE * num_examples
        return [
            *self._hits["own"].finding(
                "control_token",
                Severity.ERROR,
                self._file,
                "The base reads these as its own control tokens, so one message becomes several: remove them.",
            ),
            *self._hits["token"].finding(
                "foreign_control_token",
                Severity.WARNING,
                self._file,
                "Control tokens of a chat format inside a message: give turns as messages, and remove them.",
            ),
            *self._hits["order"].finding(
                "injection_text",
                Severity.WARNING,
                self._file,
                "Looks like an attempt to override instructions: remove it, unless the answer shows how to resist.",
            ),
            *headers.finding(
                "role_header",
                Severity.INFO if usual else Severity.WARNING,
                self._file,
                "Turns are written into a text: give each as a message of its own, or the model learns to invent them.",
            ),
        ]

    def _search(self, name: str, pattern: re.Pattern[str], row: Row) -> bool:
        """Whether any text matches; it is counted once a line."""
        hits = self._hits[name]
        for _, text in row.texts:
            match = pattern.search(text)
            if match is not None and not (name == "header" and _BARE.match(text)):
                hits.add(row.line)
                if hits.wants_excerpt:
                    hits.excerpts.append(self._redactor.excerpt(text, match.start()))
                return True
        return False
