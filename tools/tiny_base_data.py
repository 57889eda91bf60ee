"""Corpora of the bundled base: readers, clean-up, splits, and the stream of training documents.

A document is a plain string that already carries its special tokens, so that the tokenizer sees exactly
what the chat template would have produced. Five sources come out of here, each with a held-out part:

* ``books``         public-domain novels, capped per author so that no single voice dominates,
* ``peps``          Python enhancement proposals, for modern technical prose,
* ``dialogues``     service dialogues rendered in the chat template,
* ``instructions``  the annotations of those dialogues turned into tasks (see ``tiny_base_tasks``),
* ``support``       short labelled customer messages (see ``tiny_base_support``).
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [PAD, BOS, EOS, IM_START, IM_END]
SOURCES = ("books", "peps", "dialogues", "instructions", "support")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Message = tuple[str, str]
AUTHOR_CHARS = 1_600_000
HELD_OUT_EVERY = 100


@dataclass(frozen=True)
class Turn:
    """One utterance with what its annotators say about it."""

    speaker: str
    text: str
    service: str
    intent: str
    slots: dict[str, str]
    new_slots: dict[str, str]
    acts: tuple[tuple[str, str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Dialogue:
    """A whole conversation; ``topic`` is the name of its service or scenario in words."""

    topic: str
    turns: tuple[Turn, ...]


def render_chat(messages: list[Message]) -> str:
    """Render as the chat template does, an order of magnitude faster than Jinja."""
    body = "".join(f"{IM_START}{role}\n{text}{IM_END}\n" for role, text in messages)
    return BOS + body


def words_of(name: str) -> str:
    """``FindRestaurants`` / ``party_size`` / ``Hotels_2`` -> lower-case words."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"_\d+$", "", name))
    return spaced.replace("_", " ").lower()


def read_tar(path: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yield (member name, bytes) of the regular files of a tar archive that end with ``suffix``."""
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(suffix):
                handle = tar.extractfile(member)
                if handle is not None:
                    yield member.name, handle.read()


def clean_book(text: str) -> str:
    """Drop the header block and Markdown marks; unwrap nothing else, the prose is already clean."""
    text = text.replace("\r\n", "\n").split("-------", 1)[-1]
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>]{1,80}>", "", text)
    text = re.sub(r"(?m)^#+ *", "", text)
    text = re.sub(r"(?m)^> ?", "", text).replace("*", "").replace("\\", "")
    text = re.sub(r"(?<!\w)_([^_\n]+)_(?!\w)", r"\1", text)
    text = text.replace("\u201c", '"').replace("\u201d", '"').replace("\u2019", "'").replace("\u2018", "'")
    text = re.sub(r"(?<![\n])\n(?!\n)", " ", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


def clean_pep(text: str) -> str:
    """Keep the prose and short code of a PEP; drop the e-mail header and the reST marks."""
    text = text.replace("\r\n", "\n").split("\n\n", 1)[-1]
    text = re.sub(r"(?m)^[=\-~^\"'#*]{3,}\s*$\n?", "", text)
    text = re.sub(r"(?m)^\.\. .*$\n?", "", text)
    text = re.sub(r":[a-z:]+:`([^`<]+?)(?: <[^`>]*>)?`", r"\1", text).replace("``", "`")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def pieces(text: str, size: int) -> Iterator[str]:
    """Cut a long text into documents of about ``size`` characters at paragraph ends."""
    held: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        held.append(paragraph)
        length += len(paragraph) + 2
        if length >= size:
            yield "\n\n".join(held)
            held, length = [], 0
    if held:
        yield "\n\n".join(held)


def load_books(corpora: Path) -> list[str]:
    """Every book, capped per author, cut in documents of about 6,000 characters."""
    used: dict[str, int] = defaultdict(int)
    documents: list[str] = []
    for name, raw in read_tar(corpora / "books-1900-1927.tar.gz", ".md"):
        author = name.split("/")[0]
        room = AUTHOR_CHARS - used[author]
        if room > 20_000:
            text = clean_book(raw.decode("utf-8", "replace"))[:room]
            used[author] += len(text)
            documents += [piece for piece in pieces(text, 6_000) if len(piece) > 400]
    return documents


def load_peps(corpora: Path) -> list[str]:
    """Every PEP in documents of about 6,000 characters."""
    documents: list[str] = []
    for _, raw in read_tar(corpora / "peps.tar.gz", ".rst"):
        documents += [p for p in pieces(clean_pep(raw.decode("utf-8", "replace")), 6_000) if len(p) > 200]
    return documents


def _first(values: list[str]) -> str:
    return values[0] if values else ""


def _sgd_turns(raw: list[Any]) -> Iterator[Turn]:
    """Turns of one SGD dialogue; ``new_slots`` is what this very utterance says for the first time."""
    known: dict[str, set[str]] = defaultdict(set)
    for speaker, text, frames in raw:
        frame = next((f for f in frames if f.get("intent", "NONE") != "NONE"), frames[0] if frames else {})
        slots = {key: _first(values) for key, values in frame.get("slots", {}).items()}
        fresh = {}
        for key, values in frame.get("slots", {}).items():
            said = [v for v in values if v.lower() in text.lower() and v not in known[key]]
            if said:
                fresh[key] = said[0]
            known[key].update(values)
        acts = tuple((a, s, tuple(v)) for a, s, v in frame.get("acts", []))
        role = "user" if speaker == "U" else "assistant"
        yield Turn(role, text, frame.get("service", ""), frame.get("intent", ""), slots, fresh, acts)


def load_sgd(corpora: Path) -> list[Dialogue]:
    """Schema-guided dialogues: intents, slots and acts at every turn."""
    dialogues: list[Dialogue] = []
    for part in ("train", "dev"):
        with gzip.open(corpora / f"sgd_{part}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                topic = " and ".join(dict.fromkeys(words_of(s) for s in row["services"]))
                dialogues.append(Dialogue(topic, tuple(_sgd_turns(row["turns"]))))
    return dialogues


def _taskmaster_turn(utterance: dict[str, Any]) -> Turn:
    calls = [a["value"] for a in utterance["annotations"] if a["name"] == "api_call"]
    names: dict[str, str] = {}
    for note in utterance["annotations"]:
        if note["name"] == "request" and '"query"' in note["value"]:
            try:
                names.setdefault("item", str(json.loads(note["value"])["query"]))
            except (ValueError, KeyError):
                continue
    acts = tuple((call, "", ()) for call in dict.fromkeys(calls))
    return Turn(utterance["speaker"], utterance["text"], "coffee shop", "", names, names, acts)


def load_taskmaster(corpora: Path) -> list[Dialogue]:
    """Coffee-shop orders; the scenario name becomes the topic."""
    dialogues: list[Dialogue] = []
    for _, raw in read_tar(corpora / "taskmaster4.tar.gz", ".json.gz"):
        for row in json.load(io.TextIOWrapper(gzip.GzipFile(fileobj=io.BytesIO(raw)), encoding="utf-8")):
            topic = re.sub(r"^Auto template \w+\s*|\s*(- fixed|FIX)$", "", row["scenario"]).strip().lower()
            dialogues.append(Dialogue(topic, tuple(_taskmaster_turn(u) for u in row["utterances"])))
    return dialogues


def chat_of(dialogue: Dialogue, rng: random.Random) -> str:
    """A dialogue as chat; sometimes a system prompt says which business answers."""
    messages: list[Message] = []
    if rng.random() < 0.4:
        lead = rng.choice(
            (
                "You are a helpful assistant for {}.",
                "You are an agent who helps customers with {}.",
                "Help the user. Topic: {}.",
                "Conversation about {}.",
            )
        )
        messages.append(("system", lead.format(dialogue.topic)))
    messages += [(turn.speaker, turn.text) for turn in dialogue.turns]
    return render_chat(messages)


def split(items: list[Any], rng: random.Random) -> tuple[list[Any], list[Any]]:
    """Shuffle, then hold one item in a hundred out of training."""
    items = list(items)
    rng.shuffle(items)
    held = max(1, len(items) // HELD_OUT_EVERY)
    return items[held:], items[:held]
