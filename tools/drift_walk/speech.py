"""What a tenant's users write: new questions of its own domain, and from a point on, those of another's."""

from __future__ import annotations

import random
from collections.abc import Iterator

from openai.types.chat import ChatCompletionMessageParam

from examples.example_set import ExampleSet
from examples.make_examples import example_sets

NUM_USERS = 40


class Speech:
    """First turns of one tenant's conversations, none twice and none that its adapter was trained on."""

    def __init__(self, tenant: str, other: str, seed: int) -> None:
        sets = {one.tenant: one for one in example_sets()}
        self._instruction = sets[tenant].instruction
        self._own, self._others = _unseen(sets[tenant], seed), _unseen(sets[other], seed)
        self._user = 0

    def next(self, *, shifted: bool) -> tuple[list[ChatCompletionMessageParam], str]:
        """The prompt and its end user. A shift changes what users ask; the tenant's instruction stays."""
        question = next(self._others if shifted else self._own)
        self._user = (self._user + 1) % NUM_USERS
        messages: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": self._instruction},
            {"role": "user", "content": question},
        ]
        return messages, f"user-{self._user}"


def _unseen(examples: ExampleSet, seed: int) -> Iterator[str]:
    trained = examples.files()["train.jsonl"]
    questions = sorted({row.question for row in examples.rows if f'"{row.question}"' not in trained})
    return iter(random.Random(seed).sample(questions, len(questions)))
