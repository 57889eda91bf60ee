"""The texts of the drift bench: sources without drift, pairs with one, and conversations. Knows no model.

DIR holds `tasks/{name}/{train,validation}.jsonl` with rows of `input` and `meta`, `drift/{name}.txt` with one prompt a
line, and `corpora/sgd_dev.jsonl.gz` with dialogues of turns `[speaker, text, ...]`.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Texts = list[str]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TYPO_SHARE = 0.08
"""Of a text's letters."""


@dataclass(frozen=True)
class Shift:
    """`before` are the prompts that the reference and the quiet part of a stream come from."""

    name: str
    before: Texts
    after: Texts


@dataclass(frozen=True)
class Drifting:
    """`sources` by name; `conversations`: what a user says, turn by turn."""

    sources: dict[str, Texts]
    shifts: list[Shift]
    conversations: list[Texts]


def read(data: Path, pool: int, num_conversations: int, seed: int) -> Drifting:
    """At most `pool` prompts of a source, in random order, each only once."""
    rng = random.Random(seed)

    def some(texts: Iterable[str]) -> Texts:
        found = sorted({text.strip() for text in texts} - {""})
        rng.shuffle(found)
        return found[:pool]

    def inputs(task: str, chosen: Callable[[dict[str, Any]], bool] = lambda meta: True) -> Texts:
        return some(row["input"] for row in _rows(data / "tasks" / task) if chosen(row["meta"]))

    def lines(name: str) -> Texts:
        return some((data / "drift" / f"{name}.txt").read_text(encoding="utf-8").splitlines())

    labels = sorted({row["meta"]["label"] for row in _rows(data / "tasks" / "banking77")})
    rare = set(rng.sample(labels, len(labels) // 8))
    banking = inputs("banking77")
    shifts = [
        Shift(
            "other domain: CLINC banking → travel",
            inputs("clinc150", lambda meta: meta["domain"] == "banking"),
            inputs("clinc150", lambda meta: meta["domain"] == "travel"),
        ),
        Shift("other domain: NLU++ banking → hotels", lines("nlupp_banking"), lines("nlupp_hotels")),
        Shift("other time: PEPs 2000-05 → 2020-26", lines("pep_sentences_2000_2005"), lines("pep_sentences_2020_2026")),
        Shift("other mix: Banking77 → 9 of 77 labels", banking, inputs("banking77", lambda m: m["label"] in rare)),
        Shift("other source: Banking77 → NLU++ banking", banking, lines("nlupp_banking")),
        Shift("typos: Banking77, 8 % of letters", banking, [_with_typos(text, rng) for text in banking]),
    ]
    sources = {
        "CLINC150": inputs("clinc150"),
        "Banking77": banking,
        "product pros and cons": lines("product_pros_cons"),
    }
    return Drifting(sources, shifts, _conversations(data / "corpora" / "sgd_dev.jsonl.gz", num_conversations, rng))


def _rows(task: Path) -> Iterable[dict[str, Any]]:
    for split in ("train", "validation"):
        for line in (task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def _conversations(path: Path, count: int, rng: random.Random) -> list[Texts]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        dialogues = [json.loads(line)["turns"] for line in lines]
    rng.shuffle(dialogues)
    return [[turn[1] for turn in turns if turn[0] == "U"] for turns in dialogues[:count]]


def _with_typos(text: str, rng: random.Random) -> str:
    """Some letters left out, doubled, replaced or moved."""
    letters: list[str] = []
    for letter in text:
        if not letter.isalpha() or rng.random() >= TYPO_SHARE:
            letters.append(letter)
            continue
        kind = rng.randrange(4)
        if kind == 0:
            letters.append(letter * 2)
        elif kind == 1:
            letters.append(rng.choice(LETTERS))
        elif kind == 2 and letters:
            letters.insert(-1, letter)
    return "".join(letters)


def distinct(texts: Iterable[Sequence[str]]) -> Texts:
    """All texts, each once, in the order of their first use."""
    return list(dict.fromkeys(text for some in texts for text in some))
