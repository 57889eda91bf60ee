"""Instruction-shaped training text: annotated dialogues and plain prose turned into small tasks.

Adapters mostly learn "short message in, short answer out". These tasks make the base meet that shape in
many wordings before any adapter exists, without touching the task sets that adapters are judged on.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable

from tools.tiny_base_data import Dialogue, Message, Turn, render_chat, words_of

INTENT_PROMPTS = (
    "What does the user want? Answer with the intent.",
    "Name the intent of the message.",
    "Classify the message.",
    "Give the intent in a few words.",
    "Label the request.",
    "Which kind of request is this?",
    "Read the customer's message and name what they are asking for.",
    "Intent:",
    "You label customer messages with a short intent.",
)
TOPIC_PROMPTS = ("Which service is this about?", "Name the domain.", "What is the topic?", "Topic in one or two words.")
FINE_PROMPTS = (
    "Describe the request in detail: the intent and what is given.",
    "Name the intent and the details that the user mentions.",
    "Fine-grained label:",
    "Label the message as precisely as you can.",
)
JSON_PROMPTS = (
    "Extract the intent and the slots as JSON.",
    "Turn the message into JSON with intent and slots.",
    "Parse the request. Answer with JSON only.",
    'Return {"intent", "slots"} for the message.',
)
SAY_PROMPTS = (
    "Write a sentence from these facts.",
    "Say this in plain English.",
    "Turn the data into a natural sentence.",
    "Express the following to the customer.",
)
ACT_PROMPTS = ("What does the agent do in this message?", "Name the dialogue acts.", "Describe the reply as acts.")
ASK_PROMPTS = (
    "Write a message from a customer who wants: {}",
    "How might a user ask for this? {}",
    "Example for the intent: {}",
)
SAME_PROMPTS = (
    "Do these two messages ask for the same thing? Answer yes or no.",
    "Same intent? yes or no.",
    "Are the two requests of the same kind?",
)
SUM_PROMPTS = ("Summarize the conversation.", "What was agreed on?", "List what the user asked for.")


def framed(prompt: str, text: str, answer: str, rng: random.Random, bare: float = 0.0) -> list[Message]:
    """Lay one task out: instruction as system prompt, before the text, after it, or not at all."""
    if rng.random() < bare:
        return [("user", text), ("assistant", answer)]
    shape = rng.random()
    if shape < 0.6:
        return [("system", prompt), ("user", text), ("assistant", answer)]
    if shape < 0.85:
        return [("user", f"{prompt}\n\n{text}"), ("assistant", answer)]
    return [("user", f"{text}\n\n{prompt}"), ("assistant", answer)]


class TaskMaker:
    """Draws tasks from dialogues; keeps an index of utterances by label for pairs and few-shot prompts."""

    def __init__(self, dialogues: list[Dialogue], prose: list[str], rng: random.Random) -> None:
        self.rng = rng
        self.dialogues = dialogues
        self.prose = prose
        self.turns: list[tuple[Turn, str]] = []
        self.replies: list[Turn] = []
        self.by_intent: dict[str, list[str]] = defaultdict(list)
        self.by_fine: dict[str, list[str]] = defaultdict(list)
        self.orders = [d for d in dialogues if d.turns[0].service == "coffee shop"]
        for dialogue in dialogues:
            self._index(dialogue)
        self.intents = sorted(self.by_intent)
        self.fine_labels = sorted(label for label, texts in self.by_fine.items() if len(texts) > 2)
        self.makers: list[tuple[Callable[[], list[Message]], float]] = [
            (self.intent, 3.0), (self.fine, 3.0), (self.topic, 1.0), (self.choice, 1.5), (self.slots_json, 2.0),
            (self.slot_value, 1.0), (self.say, 2.0), (self.acts, 1.5), (self.ask, 1.5), (self.same, 1.5),
            (self.few_shot, 1.5), (self.summary, 0.5), (self.sql, 0.7), (self.coffee, 0.7), (self.words_task, 1.5),
            (self.cloze, 0.8), (self.reorder, 0.4), (self.arithmetic, 0.4),
        ]  # fmt: skip

    def _index(self, dialogue: Dialogue) -> None:
        """File each informative user turn under its intent, and under intent plus what it adds."""
        asked, before = "", ""
        for turn, following in zip(dialogue.turns, [*dialogue.turns[1:], None], strict=True):
            if turn.speaker == "assistant":
                if turn.acts and turn.service != "coffee shop":
                    self.replies.append(turn)
                asked = next((slot for act, slot, _ in turn.acts if act == "REQUEST"), "")
                continue
            wordy = len(turn.text.split()) > 3
            telling = turn.new_slots or "?" in turn.text or turn.intent != before
            before = turn.intent
            if turn.service == "coffee shop" and wordy:
                self.by_fine[dialogue.topic].append(turn.text)
            elif turn.intent not in ("", "NONE") and wordy and telling:
                fine = self._fine_label(turn, asked, following)
                self.turns.append((turn, fine))
                self.by_intent[words_of(turn.intent)].append(turn.text)
                self.by_fine[fine].append(turn.text)

    @staticmethod
    def _fine_label(turn: Turn, asked: str, following: Turn | None) -> str:
        """``reserve hotel: destination and check in date`` - thousands of fine distinctions for free.

        What a question asks about is read off the reply: the slots that the agent then informs of.
        """
        intent = words_of(turn.intent)
        if turn.new_slots:
            return f"{intent}: {' and '.join(words_of(key) for key in sorted(turn.new_slots))}"
        if "?" in turn.text and following is not None:
            told = [words_of(slot) for act, slot, _ in following.acts if act == "INFORM" and slot]
            return f"{intent}: ask {' and '.join(told)}" if told else f"{intent}: question"
        return f"{intent}: answer {words_of(asked)}" if asked else intent

    def draw(self) -> str:
        """One task as a rendered chat."""
        makers, weights = zip(*self.makers, strict=True)
        return render_chat(self.rng.choices(makers, weights)[0]())

    def _prompted(self, prompts: tuple[str, ...], text: str, answer: str, bare: float = 0.0) -> list[Message]:
        return framed(self.rng.choice(prompts), text, answer, self.rng, bare)

    def intent(self) -> list[Message]:
        """Utterance -> intent as words; intents are drawn evenly so that rare ones count."""
        label = self.rng.choice(self.intents)
        return self._prompted(INTENT_PROMPTS, self.rng.choice(self.by_intent[label]), label, bare=0.4)

    def fine(self) -> list[Message]:
        """Utterance -> intent and the slots it fills."""
        turn, label = self.rng.choice(self.turns)
        return self._prompted(FINE_PROMPTS, turn.text, label, bare=0.2)

    def topic(self) -> list[Message]:
        """Utterance -> service."""
        turn, _ = self.rng.choice(self.turns)
        return self._prompted(TOPIC_PROMPTS, turn.text, words_of(turn.service))

    def choice(self) -> list[Message]:
        """Utterance and a list of candidates -> the one that fits."""
        fine = self.rng.random() < 0.5
        labels, index = (self.fine_labels, self.by_fine) if fine else (self.intents, self.by_intent)
        options = self.rng.sample(labels, self.rng.randint(2, 6))
        answer = self.rng.choice(options)
        text = self.rng.choice(index[answer])
        listed = "; ".join(options) if self.rng.random() < 0.5 else "\n" + "\n".join(f"- {o}" for o in options)
        return [("user", f"{text}\n\nWhich label fits? {listed}"), ("assistant", answer)]

    def slots_json(self) -> list[Message]:
        """Utterance -> JSON."""
        turn, _ = self.rng.choice(self.turns)
        answer = {"intent": words_of(turn.intent), "slots": dict(sorted(turn.new_slots.items()))}
        return self._prompted(JSON_PROMPTS, turn.text, json.dumps(answer, ensure_ascii=False))

    def slot_value(self) -> list[Message]:
        """Utterance and a slot name -> its value, or that it is not given."""
        turn, _ = self.rng.choice(self.turns)
        names = list(turn.new_slots) or ["date"]
        name = self.rng.choice(names) if self.rng.random() < 0.8 else self.rng.choice(("city", "date", "time", "price"))
        question = f"What is the {words_of(name)}?"
        return [("user", f"{turn.text}\n\n{question}"), ("assistant", turn.new_slots.get(name, "not given"))]

    def _facts(self, turn: Turn) -> str:
        """Acts of a reply as a data record, in one of three notations."""
        style = self.rng.randint(0, 2)
        parts = []
        for act, slot, values in turn.acts:
            value = ", ".join(values)
            pair = (f"{words_of(slot)}: {value}", f"{slot} = {value}", f"{words_of(slot)}[{value}]")[style]
            parts.append(f"{words_of(act)} {pair}" if slot and value else f"{words_of(act)} {words_of(slot)}".strip())
        return (", ", " | ", ", ")[style].join(parts)

    def say(self) -> list[Message]:
        """Facts -> sentence."""
        turn = self.rng.choice(self.replies)
        return self._prompted(SAY_PROMPTS, self._facts(turn), turn.text)

    def acts(self) -> list[Message]:
        """Sentence -> acts, the inverse."""
        turn = self.rng.choice(self.replies)
        answer = "; ".join(f"{words_of(act)} {words_of(slot)}".strip() for act, slot, _ in turn.acts)
        return self._prompted(ACT_PROMPTS, turn.text, answer)

    def ask(self) -> list[Message]:
        """Label -> utterance: gives the words of labels their meaning."""
        label = self.rng.choice(self.fine_labels)
        return [
            ("user", self.rng.choice(ASK_PROMPTS).format(label)),
            ("assistant", self.rng.choice(self.by_fine[label])),
        ]

    def same(self) -> list[Message]:
        """Two utterances -> whether they ask for the same thing."""
        label = self.rng.choice(self.fine_labels)
        same = self.rng.random() < 0.5
        other = label if same else self.rng.choice(self.fine_labels)
        first, second = self.rng.choice(self.by_fine[label]), self.rng.choice(self.by_fine[other])
        return self._prompted(SAME_PROMPTS, f"1. {first}\n2. {second}", "yes" if other == label else "no")

    def few_shot(self) -> list[Message]:
        """k worked examples and a query with one of their labels, as turns or inside one message."""
        labels = self.rng.sample(self.intents, self.rng.randint(2, 4))
        shots = [(self.rng.choice(self.by_intent[label]), label) for label in labels * self.rng.randint(1, 2)]
        self.rng.shuffle(shots)
        answer = self.rng.choice(labels)
        query = self.rng.choice(self.by_intent[answer])
        if self.rng.random() < 0.5:
            listed = "\n".join(f"Message: {text}\nIntent: {label}" for text, label in shots)
            return [("user", f"{listed}\nMessage: {query}\nIntent:"), ("assistant", answer)]
        messages: list[Message] = [("system", self.rng.choice(INTENT_PROMPTS))]
        for text, label in [*shots, (query, answer)]:
            messages += [("user", text), ("assistant", label)]
        return messages

    def summary(self) -> list[Message]:
        """A whole dialogue -> its final state as a list."""
        dialogue = self.rng.choice(self.dialogues)
        final = next((t for t in reversed(dialogue.turns) if t.speaker == "user" and t.slots), None)
        if final is None or len(dialogue.turns) > 16:
            return self.intent()
        talk = "\n".join(f"{'User' if t.speaker == 'user' else 'Agent'}: {t.text}" for t in dialogue.turns)
        answer = "; ".join(f"{words_of(key)}: {value}" for key, value in final.slots.items())
        return [("user", f"{self.rng.choice(SUM_PROMPTS)}\n\n{talk}"), ("assistant", answer)]

    def sql(self) -> list[Message]:
        """Utterance -> a query over a table named after the service."""
        turn, _ = self.rng.choice(self.turns)
        where = " AND ".join(f"{k} = '{v}'" for k, v in sorted(turn.new_slots.items()))
        query = f"SELECT * FROM {words_of(turn.service).replace(' ', '_')}" + (f" WHERE {where}" if where else "") + ";"
        return self._prompted(("Write SQL for the request.", "Translate to SQL.", "SQL:"), turn.text, query)

    def coffee(self) -> list[Message]:
        """Coffee orders: first message -> scenario, item, or the calls that it needs."""
        dialogue = self.rng.choice(self.orders)
        turn = dialogue.turns[0]
        if turn.acts and self.rng.random() < 0.5:
            calls = ", ".join(words_of(act) for act, _, _ in turn.acts)
            return self._prompted(("Which calls are needed?", "List the steps."), turn.text, calls)
        return self._prompted(INTENT_PROMPTS, turn.text, dialogue.topic)

    def _sentence(self) -> str:
        """A sentence of 5 to 16 words from prose or from a dialogue."""
        if self.rng.random() < 0.4:
            return self.rng.choice(self.turns)[0].text
        for _ in range(20):
            found = re.findall(r"[A-Z][^.!?\n\"]{20,90}[.!?]", self.rng.choice(self.prose))
            if found:
                return str(self.rng.choice(found))
        return "The quick brown fox jumps over the lazy dog."

    def words_task(self) -> list[Message]:
        """Copying, casing, counting, spelling: exact work on the tokens of the message."""
        text = self._sentence()
        words = re.findall(r"[\w']+", text)[:8]
        pick = self.rng.choice(words)
        tasks = (
            ("Repeat the sentence.", text, text),
            ("Write it in upper case.", text, text.upper()),
            ("Write it in lower case.", text, text.lower()),
            ("Reverse the order of the words.", " ".join(words), " ".join(reversed(words))),
            ("How many words are there?", " ".join(words), str(len(words))),
            ("Spell the word.", pick, " ".join(pick)),
            ("Sort the words.", " ".join(words), " ".join(sorted(words, key=str.lower))),
            ("What is the last word?", " ".join(words), words[-1]),
            ("What is the first word?", text, words[0]),
            (f"Does it contain the word {self.rng.choice((pick, 'money', 'time'))}?", text, ""),
        )
        prompt, shown, answer = self.rng.choice(tasks)
        if not answer:
            answer = "yes" if prompt.split()[-1][:-1].lower() in text.lower() else "no"
        return [("user", f"{prompt}\n\n{shown}"), ("assistant", answer)]

    def cloze(self) -> list[Message]:
        """A sentence with one long word blanked -> the word."""
        text = self._sentence()
        words = [w for w in re.findall(r"[a-z]{4,}", text)] or ["the"]
        word = self.rng.choice(words)
        return self._prompted(
            ("Fill in the blank.", "Which word is missing?"), re.sub(rf"\b{word}\b", "___", text, count=1), word
        )

    def reorder(self) -> list[Message]:
        """Shuffled words -> the sentence."""
        text = self._sentence()
        words = text.split()[:12]
        mixed = self.rng.sample(words, len(words))
        return [("user", f"Put the words in order: {' '.join(mixed)}"), ("assistant", " ".join(words))]

    def arithmetic(self) -> list[Message]:
        """One-step sums, as digits."""
        a, b = self.rng.randint(0, 99), self.rng.randint(0, 20)
        text, value = self.rng.choice(
            ((f"{a} + {b}", a + b), (f"{a + b} - {b}", a), (f"{a % 10} * {b % 10}", (a % 10) * (b % 10)))
        )
        return [
            ("user", self.rng.choice(("What is {}?", "{} =", "Compute {}.")).format(text)),
            ("assistant", str(value)),
        ]
