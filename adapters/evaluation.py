"""A candidate adapter against the base alone, the base with examples in the prompt, and what answers now.

All answer the same held-out examples, greedily. Who generates is the caller's business: the service passes its engine,
so evaluation shares the batch with live requests. Knows no job and no engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from adapters.assertions import Assertion
from adapters.corpus import Codec, build_corpus, render_prompt
from adapters.evaluation_report import ACTIVE, BASE, CANDIDATE, FEW_SHOT, EvaluationReport, Performance, make_report
from adapters.example import ChatExample, CompletionExample, Example
from adapters.lora import Routing
from adapters.packed_loss import PackedLoss
from adapters.scoring import TaskKind, task_kind

MAX_ANSWER_TOKENS = 256
MIN_ASSERTED_TOKENS = 64
"""Where assertions look at the answers, these may be at least so long: a cut answer would pass a `max_length`."""
ROUND = 32
"""Examples that everybody answers before the clock is asked whether there is time for more."""


class Generate(Protocol):
    """Greedy continuations of prompts; `adapter` is None for the base. Results may hold the end token."""

    def __call__(self, prompts: list[list[int]], adapter: str | None, max_tokens: int) -> list[list[int]]: ...


@dataclass(frozen=True)
class Entrant:
    """An adapter as `generate` calls it, and how the loss reaches it."""

    adapter: str
    route: Routing


@dataclass(frozen=True)
class EvaluationOptions:
    """`task` None: told by the expected answers. `max_seconds` bounds the whole, to a round."""

    max_examples: int = 200
    max_seconds: float = 180.0
    num_shots: int = 8
    task: TaskKind | None = None
    assertions: tuple[Assertion, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class _Contestant:
    """Who answers what: `examples` are the same for all, but may stand behind shots."""

    examples: Sequence[Example]
    entrant: Entrant | None


class Evaluation:
    """Everything an evaluation needs of its surroundings."""

    def __init__(
        self,
        codec: Codec,
        loss: PackedLoss,
        generate: Generate,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.codec = codec
        self.loss = loss
        self.generate = generate
        self.max_model_len = max_model_len
        self._clock = clock

    def compare(
        self,
        held_out: Sequence[Example],
        training: Sequence[Example],
        *,
        candidate: Entrant,
        active: Entrant | None = None,
        options: EvaluationOptions,
        between_packs: Callable[[], None] = lambda: None,
    ) -> EvaluationReport | None:
        """Let everybody answer the held-out examples.

        `training` is a sample of the training examples: it tells the kind of task, and as many of them as fit into the
        model's length (at most `num_shots`, different answers first) stand before each prompt of the few-shot
        contestant. None when no held-out example leaves room for an answer. `between_packs` is called between
        examples, too, where these are rendered or scored.
        """
        examples = _shuffled(held_out, options.seed)[: options.max_examples]
        checked = bool(options.assertions) or any(example.assertions for example in examples)
        max_tokens = self._max_answer_tokens(examples, checked)
        fitting = [example for example in examples if self._fits(example, max_tokens)]
        if not fitting:
            return None
        alike = [shot for shot in _shuffled(training, options.seed) if type(shot) is type(fitting[0])]
        num_shots, prompted = self._with_shots(fitting, choose_shots(alike, options.num_shots), max_tokens)
        contestants = {
            BASE: _Contestant(fitting, None),
            FEW_SHOT: _Contestant(prompted, None),
            CANDIDATE: _Contestant(fitting, candidate),
        }
        if active is not None:
            contestants[ACTIVE] = _Contestant(fitting, active)
        performances = self._in_rounds(contestants, len(fitting), max_tokens, options.max_seconds, between_packs)
        num_done = len(performances[CANDIDATE].answers)
        return make_report(
            fitting[:num_done],
            performances,
            options.task or task_kind([example.answer for example in (*training, *fitting)]),
            assertions=options.assertions,
            seed=options.seed,
            num_left_out=len(examples) - num_done,
            num_shots=num_shots,
            on_example=between_packs,
        )

    def _in_rounds(
        self,
        contestants: dict[str, _Contestant],
        num_examples: int,
        max_tokens: int,
        max_seconds: float,
        between_packs: Callable[[], None],
    ) -> dict[str, Performance]:
        """Rounds of a few examples, all contestants in each, until all are done or another would take too long."""
        started = self._clock()
        rounds: dict[str, list[Performance]] = {name: [] for name in contestants}
        for start in range(0, num_examples, ROUND):
            for name, contestant in contestants.items():
                part = contestant.examples[start : start + ROUND]
                rounds[name].append(self._perform(part, contestant.entrant, max_tokens, between_packs))
            spent = self._clock() - started
            if spent + spent / len(rounds[CANDIDATE]) > max_seconds:
                break
        return {name: _joined(parts) for name, parts in rounds.items()}

    def _perform(
        self,
        examples: Sequence[Example],
        entrant: Entrant | None,
        max_tokens: int,
        between_packs: Callable[[], None],
    ) -> Performance:
        prompts = []
        for example in examples:
            prompts.append(render_prompt(example, self.codec))
            between_packs()
        outputs = self.generate(prompts, entrant.adapter if entrant else None, max_tokens)
        decode = self.codec.tokenizer.decode
        answers = tuple(decode(output, skip_special_tokens=True).strip() for output in outputs)
        between_packs()
        corpus = build_corpus(map(last_answer_only, examples), self.codec, max_length=self.max_model_len)
        nats, counts = self.loss.per_sequence(corpus, entrant.route if entrant else None, between_packs)
        return Performance(answers, np.array(nats), np.array(counts, dtype=np.float64))

    def _max_answer_tokens(self, examples: Sequence[Example], checked: bool) -> int:
        """A little more than the longest expected answer: what is longer cannot match it."""
        encode = self.codec.tokenizer.encode
        longest = max((len(encode(example.answer, add_special_tokens=False)) for example in examples), default=0)
        return min(max(longest + 4, MIN_ASSERTED_TOKENS if checked else 0), MAX_ANSWER_TOKENS)

    def _fits(self, example: Example, max_tokens: int) -> bool:
        return len(render_prompt(example, self.codec)) + max_tokens <= self.max_model_len

    def _with_shots(
        self, examples: Sequence[Example], shots: list[Example], max_tokens: int
    ) -> tuple[int, list[Example]]:
        """The largest number of shots with which every example still fits, and the examples behind them."""
        while shots:
            prompted = [with_shots(example, shots) for example in examples]
            if all(self._fits(example, max_tokens) for example in prompted):
                return len(shots), prompted
            shots.pop()
        return 0, list(examples)


def choose_shots(training: Sequence[Example], count: int) -> list[Example]:
    """Examples with different answers as long as there are any: eight times the same label would teach one label."""
    seen: set[str] = set()
    new: list[Example] = []
    repeated: list[Example] = []
    for example in training:
        (repeated if example.answer in seen else new).append(example)
        seen.add(example.answer)
    return (new + repeated)[:count]


def with_shots(example: Example, shots: Sequence[Example]) -> Example:
    """The example behind solved ones: as earlier turns of a chat, or as paragraphs of a prompt."""
    if isinstance(example, CompletionExample):
        solved = [shot.prompt + shot.completion for shot in shots if isinstance(shot, CompletionExample)]
        return replace(example, prompt="\n\n".join([*solved, example.prompt]))
    turns = [
        message
        for shot in shots
        if isinstance(shot, ChatExample)
        for message in shot.messages
        if message.role != "system"
    ]
    num_system = next(i for i, message in enumerate(example.messages) if message.role != "system")
    return replace(example, messages=(*example.messages[:num_system], *turns, *example.messages[num_system:]))


def last_answer_only(example: Example) -> Example:
    """The example with its last learned answer as the only one that counts."""
    if isinstance(example, CompletionExample):
        return example
    context = [replace(message, trained=False) for message in example.prompt]
    return replace(example, messages=(*context, example.messages[len(context)]))


def _shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """By seed: when time runs out, what was evaluated shall be no beginning of a sorted file."""
    return [examples[index] for index in np.random.default_rng(seed).permutation(len(examples))]


def _joined(parts: Sequence[Performance]) -> Performance:
    return Performance(
        tuple(answer for part in parts for answer in part.answers),
        np.concatenate([part.nats for part in parts]),
        np.concatenate([part.num_tokens for part in parts]),
    )
