"""A tenant of the soak: its keys and what the service has acknowledged of it. Knows no operation."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from tools.soak.books import Books
from tools.soak.caller import Caller
from tools.soak.house import BASE_NAME

FINISHED = frozenset({"succeeded", "failed", "cancelled"})


@dataclass
class Shared:
    """What all tenants have in common."""

    caller: Caller
    books: Books
    admin_key: str
    adapter: Path
    """A zip that can be imported."""
    answers: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """(adapter's digest, form, prompt) -> the greedy answer: there is only one, whoever asks, whatever is killed."""
    num_jobs: int = 0
    """Unfinished ones, of everybody."""


@dataclass
class Tenant:
    """`unsure` are things whose making or unmaking was cut short: they may be there or not."""

    shared: Shared
    rng: random.Random
    id: str
    name: str
    key: str
    key_id: str
    is_limited: bool = False
    files: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)
    jobs: dict[str, str] = field(default_factory=dict)
    """Id -> the status that was seen last."""
    alias: str | None = None
    """What the alias `best` points at; None while there is none."""
    canary: str | None = None
    unsure: set[str] = field(default_factory=set)
    completions: list[str] = field(default_factory=list)

    @property
    def account(self) -> tuple[str, str]:
        return self.id, self.key_id

    @property
    def in_use(self) -> set[str]:
        return {model for model in (self.alias, self.canary) if model is not None}

    @property
    def has_unfinished_jobs(self) -> bool:
        return any(status not in FINISHED for status in self.jobs.values())

    def some_model(self) -> tuple[str, set[str]]:
        """What a request names, and which models may answer it; all, while a job may move the alias."""
        choices: list[tuple[str, set[str]]] = [(BASE_NAME, {BASE_NAME})] * 2 + [
            (model, {model}) for model in sorted(self.models)[:4]
        ]
        if self.alias is not None:
            choices += [("best", set() if self.has_unfinished_jobs else self.in_use)] * 2
        return self.rng.choice(choices)

    def remember(self, completion: str) -> None:
        self.completions = [*self.completions[-9:], completion]
