"""Customer-support text for the bundled base: short labelled messages in the language of today.

The books are a century old and the dialogues are about leisure, so words such as *refund* or *password*
hardly occur in them. Two remedies, both optional and neither taken from a task set that adapters are
judged on: labelled utterances of openly licensed intent collections (a folder ``extra/`` beside
``corpora/``), and a small grammar that composes complaint x object, so that a label has to be read off
the whole message rather than off one word.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tools.tiny_base_data import Message, render_chat, words_of
from tools.tiny_base_tasks import ASK_PROMPTS, INTENT_PROMPTS, SAME_PROMPTS, framed

MULTIDOGO = {
    "changeseatassignment": "change seat assignment", "getboardingpass": "get boarding pass",
    "bookflight": "book flight", "getseatinfo": "get seat info", "orderpizzaintent": "order pizza",
    "orderdrinkintent": "order drink", "ordersaladintent": "order salad", "orderburgerintent": "order burger",
    "orderdessertintent": "order dessert", "ordersideintent": "order side", "orderbreakfastintent": "order breakfast",
    "reportlostcard": "report lost card", "updateaddress": "update address", "checkbalance": "check balance",
    "transfermoney": "transfer money", "disputecharge": "dispute charge", "replacecard": "replace card",
    "closeaccount": "close account", "checkoffereligibility": "check offer eligibility",
    "getroutingnumber": "get routing number", "orderchecks": "order checks",
    "getproofofinsurance": "get proof of insurance", "checkclaimstatus": "check claim status",
    "reportbrokenphone": "report broken phone", "startserviceintent": "start service",
    "getinformationintent": "get information", "viewbillsintent": "view bills",
    "upgradeserviceintent": "upgrade service", "reportbrokensoftware": "report broken software",
    "softwareupdate": "software update", "expensereport": "expense report", "startorder": "start order",
    "checkserverstatus": "check server status", "changeorder": "change order", "stoporder": "stop order",
}  # fmt: skip

OPENERS = ["", "", "", "hi, ", "hello, ", "hey there, ", "please help. ", "excuse me, ", "um, ", "so, ",
           "i have a problem: ", "quick question: ", "i was wondering, ", "urgent! ", "good morning. "]  # fmt: skip
CLOSERS = ["", "", "", "", ". thanks", ". please help", ", can you help?", ". what should i do?", ". is that normal?",
           ". i need it today", ". i am travelling at the moment", ". this is the second time", "!", "?"]  # fmt: skip


def read_multidogo(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """MultiDoGO, sentence-level: one set per domain, only sentences that carry a request."""
    sets: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(folder.glob("*.tsv")):
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
        named = {(r[4], MULTIDOGO[r[6]]) for r in rows if len(r) == 7 and r[6] in MULTIDOGO}
        sets[path.stem] = sorted((text, label) for text, label in named if len(text.split()) > 2)
    return sets


def read_extra(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Labelled utterances of the optional collections, as {set: [(text, label)]}."""
    sets = read_multidogo(folder / "multidogo")
    for name in ("bitext.csv", "hwu.csv"):
        if (folder / name).exists():
            with (folder / name).open(encoding="utf-8", newline="") as lines:
                rows = [row for row in csv.reader(lines) if len(row) > 1 and row[1] != "intent"]
            sets[name] = [(row[0], words_of(row[1])) for row in rows]
    return {name: rows for name, rows in sets.items() if rows}


@dataclass(frozen=True)
class Kind:
    """Objects that can have the same troubles, and what people say of each trouble."""

    objects: list[str]
    issues: list[tuple[str, list[str]]]


def read_grammar() -> list[Kind]:
    """The kinds of ``tiny_base_support.txt``."""
    kinds: list[Kind] = []
    for line in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            kinds.append(Kind(line.strip("[]").split(": ", 1)[1].split(", "), []))
        elif line and not line.startswith("#"):
            label, said = line.split(": ", 1)
            kinds[-1].issues.append((label, said.split(" | ")))
    return kinds


def compose(kinds: list[Kind], rng: random.Random) -> tuple[str, str]:
    """One message of the grammar with its label."""
    kind = rng.choice(kinds)
    noun, (label, said) = rng.choice(kind.objects), rng.choice(kind.issues)
    text = rng.choice(OPENERS) + rng.choice(said).format(o=noun) + rng.choice(CLOSERS)
    if rng.random() < 0.6:
        text = re.sub(r"\bi\b", "I", text)
        text = text[:1].upper() + text[1:]
        text += "" if text[-1] in "?!." else rng.choice((".", "?", ""))
    return text, label.format(o=noun)


def task_texts(folder: Path) -> set[str]:
    """Messages of task sets that happen to lie beside the corpora: whatever equals one is left out."""
    texts: set[str] = set()
    for path in sorted(folder.glob("*/*.jsonl")):
        texts |= {plain(json.loads(line)["input"]) for line in path.read_text(encoding="utf-8").splitlines()}
    return texts


def plain(text: str) -> str:
    """Lower case without the outer punctuation, for comparing messages."""
    return text.lower().strip(" ?.!")


class SupportMaker:
    """Draws classification-shaped tasks: from one labelled set at a time, so that labels compete."""

    def __init__(self, folder: Path, rng: random.Random, held: bool) -> None:
        self.rng = rng
        self.banned = task_texts(folder / "tasks")
        self.sets: dict[str, dict[str, list[str]]] = {}
        for name, rows in read_extra(folder / "extra").items():
            self._add(name, [row for i, row in enumerate(rows) if (i % 50 == 0) == held])
        kinds = read_grammar()
        self._add("grammar", [compose(kinds, rng) for _ in range(2_000 if held else 20_000)])
        self.names = list(self.sets)
        self.weights = [min(4_000, sum(map(len, by.values()))) ** 0.7 for by in self.sets.values()]

    def _add(self, name: str, rows: list[tuple[str, str]]) -> None:
        by: dict[str, list[str]] = defaultdict(list)
        for text, label in rows:
            if plain(text) not in self.banned:
                by[label].append(text)
        if len(by) > 1:
            self.sets[name] = by

    def draw(self) -> str:
        """One task as a rendered chat."""
        by = self.sets[self.rng.choices(self.names, self.weights)[0]]
        label = self.rng.choice(list(by))
        text = self.rng.choice(by[label])
        kind = self.rng.random()
        if kind < 0.55:
            return render_chat(framed(self.rng.choice(INTENT_PROMPTS), text, label, self.rng, bare=0.6))
        if kind < 0.67:
            options = [*self.rng.sample(list(by), min(len(by), self.rng.randint(2, 5))), label]
            listed = "; ".join(sorted(dict.fromkeys(options), key=lambda _: self.rng.random()))
            return render_chat([("user", f"{text}\n\nWhich label fits? {listed}"), ("assistant", label)])
        if kind < 0.79:
            return render_chat([("user", self.rng.choice(ASK_PROMPTS).format(label)), ("assistant", text)])
        if kind < 0.91:
            return self._same(by, label, text)
        return self._few_shot(by)

    def _same(self, by: dict[str, list[str]], label: str, text: str) -> str:
        other = label if self.rng.random() < 0.5 else self.rng.choice(list(by))
        prompt = self.rng.choice(SAME_PROMPTS)
        pair = f"1. {text}\n2. {self.rng.choice(by[other])}"
        return render_chat(framed(prompt, pair, "yes" if other == label else "no", self.rng))

    def _few_shot(self, by: dict[str, list[str]]) -> str:
        labels = self.rng.sample(list(by), min(len(by), self.rng.randint(2, 4)))
        shots = [*labels, self.rng.choice(labels)]
        messages: list[Message] = [("system", self.rng.choice(INTENT_PROMPTS))] if self.rng.random() < 0.6 else []
        for label in shots:
            messages += [("user", self.rng.choice(by[label])), ("assistant", label)]
        return render_chat(messages)
