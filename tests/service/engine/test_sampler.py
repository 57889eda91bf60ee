"""Sampling: each filter against its definition, seeds against the batch, penalties, log-probabilities."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from service.engine.sampler import Sampler
from service.engine.sequence import GenerationRequest, SamplingParams, Sequence

LOGITS = torch.log(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01]))


def sequence(prompt: tuple[int, ...] = (0,), output: tuple[int, ...] = (), **params: Any) -> Sequence:
    made = Sequence(GenerationRequest("r", prompt, SamplingParams(**params), "t"), max_tokens=10)
    made.output_token_ids.extend(output)
    return made


def draws(num: int = 4000, **params: Any) -> Counter[int]:
    one = sequence(**params)
    sampled = Sampler().sample(LOGITS.expand(num, -1), [one] * num, list(range(num)))
    return Counter(s.token_id for s in sampled)


def test_frequencies_follow_the_distribution() -> None:
    counts = draws()
    expected = [4000 * p for p in LOGITS.exp().tolist()]
    chi2 = sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected))
    assert chi2 < 25  # 5 degrees of freedom: p < 0.0002


def test_temperature_zero_is_greedy_and_a_low_one_nearly() -> None:
    assert draws(50, temperature=0.0) == {0: 50}
    assert draws(temperature=0.05)[0] > 3900
    assert draws(50, temperature=1e-300) == {0: 50}


@pytest.mark.slow
def test_each_filter_keeps_what_its_definition_keeps() -> None:
    assert set(draws(top_k=2)) == {0, 1}
    assert set(draws(top_p=0.69)) == {0, 1}
    assert set(draws(top_p=0.71)) == {0, 1, 2}
    assert set(draws(min_p=0.3)) == {0, 1, 2}
    assert set(draws(top_p=0.0)) == {0}
    assert set(draws(top_k=4, top_p=0.8)) == {0, 1, 2}


def test_a_seed_gives_the_same_token_in_any_batch_and_another_at_each_position() -> None:
    seeds = [3, 1, 4, 1, 5, 9, 2, 6]
    rows = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    made = [sequence() for _ in seeds]
    together = Sampler().sample(rows, made, seeds)
    alone = [Sampler().sample(rows[i : i + 1], [made[i]], [seeds[i]])[0] for i in range(8)]
    assert together == alone
    at = {Sampler().sample(rows[:1], [sequence(output=(0,) * i)], [7])[0].token_id for i in range(40)}
    assert len(at) > 20


def test_presence_and_frequency_count_the_output_only() -> None:
    prompted = sequence(prompt=(0, 0, 0), temperature=0.0, presence_penalty=2.0)
    assert Sampler().sample(LOGITS[None], [prompted], [0])[0].token_id == 0
    present = sequence(output=(0,), temperature=0.0, presence_penalty=0.5)
    assert Sampler().sample(LOGITS[None], [present], [0])[0].token_id == 1
    often = sequence(output=(0, 0, 0, 1), temperature=0.0, frequency_penalty=0.3)
    assert Sampler().sample(LOGITS[None], [often], [0])[0].token_id == 1
    rarely = sequence(output=(0,), temperature=0.0, frequency_penalty=0.2)
    assert Sampler().sample(LOGITS[None], [rarely], [0])[0].token_id == 0


def test_repetition_counts_the_prompt_too_and_leaves_the_other_rows_alone() -> None:
    punished = sequence(prompt=(0,), temperature=0.0, repetition_penalty=3.0)
    plain = sequence(prompt=(0,), temperature=0.0)
    sampled = Sampler().sample(LOGITS.expand(2, -1), [punished, plain], [0, 0])
    assert [s.token_id for s in sampled] == [1, 0]


def test_logprobs_are_the_models_own_whatever_the_sampling() -> None:
    asked = sequence(temperature=0.0, logprobs=2, output=(0,), presence_penalty=2.0)
    [sampled] = Sampler().sample(LOGITS[None], [asked], [0])
    assert sampled.token_id == 1
    assert math.isclose(sampled.logprob or 0, math.log(0.3), rel_tol=1e-4)
    assert [token for token, _ in sampled.top] == [0, 1]
    assert math.isclose(sampled.top[0][1], math.log(0.4), rel_tol=1e-4)


def test_a_bias_is_added_to_the_logits_of_its_tokens_only() -> None:
    assert draws(50, temperature=0.0, logit_bias=((0, -100.0),)) == {1: 50}
    assert draws(50, logit_bias=((5, 100.0),)) == {5: 50}
    nudged = sequence(temperature=0.0, logit_bias=((1, 0.3),))  # log(0.4 / 0.3) = 0.288
    plain = sequence(temperature=0.0)
    sampled = Sampler().sample(LOGITS.expand(3, -1), [plain, nudged, plain], [0, 0, 0])
    assert [s.token_id for s in sampled] == [0, 1, 0]


def test_a_bias_comes_on_top_of_the_penalties() -> None:
    asked = sequence(output=(0,), temperature=0.0, presence_penalty=2.0, logit_bias=((0, 2.1),))
    assert Sampler().sample(LOGITS[None], [asked], [0])[0].token_id == 0


class OnlyTokens:
    """A grammar and its matcher in one: the same tokens at every step."""

    num_words = 1
    error: str | None = None
    is_free = is_complete = False

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens

    def start(self, ignore_eos: bool = False) -> OnlyTokens:
        return self

    def consume(self, token_id: int) -> bool:
        return token_id in self.tokens

    def allowed(self, bits: Any) -> None:
        bits[:] = sum(1 << token for token in self.tokens)


def test_a_grammar_leaves_its_tokens_and_touches_no_other_row() -> None:
    rows = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)) * 3
    for temperature in (0.0, 1.0, 2.0):
        plain = [sequence(temperature=temperature) for _ in range(6)]
        mixed = [
            sequence(temperature=temperature, grammar=OnlyTokens(row, (row + 1) % 6)) if row % 2 else plain[row]
            for row in range(6)
        ]
        before = Sampler().sample(rows, plain, list(range(6)))
        after = Sampler().sample(rows, mixed, list(range(6)))
        assert before[::2] == after[::2]
        assert all(after[row].token_id in (row, (row + 1) % 6) for row in (1, 3, 5))
        alone = [Sampler().sample(rows[row : row + 1], [mixed[row]], [row])[0] for row in range(6)]
        assert alone == after


def test_a_forbidden_token_is_never_drawn_however_the_numbers_round() -> None:
    flat = sequence(temperature=2.0, grammar=OnlyTokens(3, 4))
    drawn = {s.token_id for s in Sampler().sample(LOGITS.expand(3000, -1), [flat] * 3000, list(range(3000)))}
    assert drawn == {3, 4}


def test_a_bias_cannot_bring_back_what_a_grammar_forbids() -> None:
    asked = sequence(temperature=0.0, grammar=OnlyTokens(2, 3), logit_bias=((0, 100.0), (2, -100.0)))
    assert Sampler().sample(LOGITS[None], [asked], [0])[0].token_id == 3
    last_resort = sequence(temperature=0.0, grammar=OnlyTokens(2), logit_bias=((2, -100.0),))
    assert Sampler().sample(LOGITS[None], [last_resort], [0])[0].token_id == 2


def test_logprobs_are_those_before_bias_and_grammar() -> None:
    asked = sequence(temperature=0.0, logprobs=1, grammar=OnlyTokens(2), logit_bias=((2, 5.0),))
    [sampled] = Sampler().sample(LOGITS[None], [asked], [0])
    assert sampled.token_id == 2 and math.isclose(sampled.logprob or 0, math.log(0.15), rel_tol=1e-4)
    assert [token for token, _ in sampled.top] == [0]


class Count(TorchDispatchMode):
    """How many operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_a_device_is_asked_as_often_for_many_rows_as_for_few() -> None:
    """Each value fetched from a GPU waits for all of its work: it was three times a row with log-probabilities."""

    def operations(rows: int) -> int:
        cold, warm = sequence(temperature=0.0, logprobs=2), sequence(logprobs=4)
        with Count() as count:
            Sampler().sample(LOGITS.expand(2 * rows, -1), [cold, warm] * rows, list(range(2 * rows)))
        return int(count.operations)

    assert operations(20) == operations(2)


def test_rows_that_ask_for_different_numbers_of_alternatives_each_get_theirs() -> None:
    made = [sequence(temperature=0.0, logprobs=n) for n in (3, None, 0, 3, 99)]
    sampled = Sampler().sample(torch.stack([LOGITS.roll(i) for i in range(5)]), made, [0] * 5)
    assert [s.token_id for s in sampled] == [0, 1, 2, 3, 4]
    assert [len(s.top) for s in sampled] == [3, 0, 0, 3, 6]
    assert [s.logprob is None for s in sampled] == [False, True, False, False, False]
    assert [token for token, _ in sampled[3].top] == [3, 4, 5]
    assert all(s.logprob == s.top[0][1] for s in sampled if s.top)
