"""Sampling: each filter against its definition, seeds against the batch, penalties, log-probabilities."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch

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
