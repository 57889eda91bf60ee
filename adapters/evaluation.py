"""A candidate adapter against the base alone and against the base with examples in the prompt, on held-out data.

Who generates is the caller's business: the service passes its engine, so evaluation shares the batch with live
requests. Knows no job and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp
from typing import Any, Protocol

from adapters.corpus import Codec, build_corpus, render_prompt
from adapters.dataset import ChatExample, CompletionExample, Example
from adapters.lora import Routing
from adapters.packed_loss import PackedLoss

MAX_SHOTS = 8
MAX_SAMPLES = 5
MAX_ANSWER_TOKENS = 256


class Generate(Protocol):
    """Greedy continuations of prompts; `adapter` is None for the base. Results may hold the end token."""

    def __call__(self, prompts: list[list[int]], adapter: str | None, max_tokens: int) -> list[list[int]]: ...


@dataclass(frozen=True)
class Contestant:
    """`exact_match`: share of greedy answers equal up to white space. `loss`: nats per token of the answers."""

    exact_match: float
    loss: float

    @property
    def perplexity(self) -> float:
        return exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Sample:
    """One held-out example with everybody's answer."""

    line: int
    expected: str
    base: str
    few_shot: str
    adapter: str


@dataclass(frozen=True)
class EvaluationReport:
    num_examples: int
    num_shots: int
    base: Contestant
    few_shot: Contestant
    adapter: Contestant
    samples: tuple[Sample, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        contestants = {
            name: {**asdict(contestant), "perplexity": contestant.perplexity}
            for name, contestant in (("base", self.base), ("few_shot", self.few_shot), ("adapter", self.adapter))
        }
        samples = [asdict(sample) for sample in self.samples]
        return {"num_examples": self.num_examples, "num_shots": self.num_shots, **contestants, "samples": samples}


class Evaluation:
    """Everything an evaluation needs of its surroundings."""

    def __init__(self, codec: Codec, loss: PackedLoss, generate: Generate, max_model_len: int) -> None:
        self.codec = codec
        self.loss = loss
        self.generate = generate
        self.max_model_len = max_model_len

    def compare(
        self,
        held_out: Sequence[Example],
        shots: Sequence[Example],
        *,
        adapter: str,
        route: Routing,
        between_packs: Callable[[], None] = lambda: None,
    ) -> EvaluationReport | None:
        """Let all three answer the held-out examples.

        `adapter` is what `generate` calls the candidate, `route` how the loss reaches it. As many `shots` as fit
        into the model's length stand before each prompt. None when no held-out example leaves room for an answer.
        """
        max_tokens = self._max_answer_tokens(held_out)
        held_out = [example for example in held_out if self._fits(example, max_tokens)]
        if not held_out:
            return None
        num_shots, prompted = self._with_shots(held_out, list(shots[:MAX_SHOTS]), max_tokens)
        answers = {}
        contestants = {}
        for name, examples, who, way in (
            ("base", held_out, None, None),
            ("few_shot", prompted, None, None),
            ("adapter", held_out, adapter, route),
        ):
            answers[name] = self._answers(examples, who, max_tokens)
            between_packs()
            corpus = build_corpus(map(last_answer_only, examples), self.codec, max_length=self.max_model_len)
            score = self.loss.score(corpus, way, between_packs)
            contestants[name] = Contestant(_exact_match(answers[name], held_out), score.loss)
        samples = tuple(
            Sample(example.line, example.answer, **{name: answers[name][index] for name in answers})
            for index, example in enumerate(held_out[:MAX_SAMPLES])
        )
        return EvaluationReport(len(held_out), num_shots, **contestants, samples=samples)

    def _answers(self, examples: Sequence[Example], adapter: str | None, max_tokens: int) -> list[str]:
        prompts = [render_prompt(example, self.codec) for example in examples]
        outputs = self.generate(prompts, adapter, max_tokens)
        return [self.codec.tokenizer.decode(output, skip_special_tokens=True).strip() for output in outputs]

    def _max_answer_tokens(self, examples: Sequence[Example]) -> int:
        """A little more than the longest expected answer: what is longer cannot match it."""
        encode = self.codec.tokenizer.encode
        longest = max(len(encode(example.answer, add_special_tokens=False)) for example in examples)
        return min(longest + 4, MAX_ANSWER_TOKENS)

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


def _exact_match(answers: Sequence[str], examples: Sequence[Example]) -> float:
    pairs: Iterator[tuple[str, Example]] = zip(answers, examples, strict=True)
    return sum(answer.split() == example.answer.split() for answer, example in pairs) / len(examples)
