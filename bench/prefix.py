"""Time to first token behind a long system prompt that one tenant's requests share: computed again, or copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import count

from bench.goals import goal
from bench.measurement import Entry, interleave, quantity, ratio
from bench.plan import Plan
from bench.serving import Row, kv_bytes, random_prompts
from bench.subject import Subject
from bench.traffic import Client, TrafficRig, traffic

QUESTION_TOKENS = 16
"""Behind the system prompt; every request has its own."""

_ROWS_OF_ROOM = 16
"""Beginnings are kept where memory is free: two rows' worth is taken by the two that may run."""


def measure(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """One client, one adapter, no question twice. Both sides have met the system prompt before they are timed."""
    vocabulary = subject.sizes.vocabulary
    (shared,) = random_prompts(vocabulary, 1, plan.prefix_tokens, plan.prefix_tokens, seed=9)
    seeds = count(10)

    def rows(num: int) -> list[Row]:
        questions = random_prompts(vocabulary, num, QUESTION_TOKENS, QUESTION_TOKENS, seed=next(seeds))
        return [Row(shared + question, "0") for question in questions]

    def first_token(rig: TrafficRig, num: int) -> Mapping[str, float]:
        return {"first token": rig.converse([Client(iter(rows(num)), 1)]).median_first_token_ms}

    load, room = subject.adapters.__getitem__, kv_bytes(subject.base, _ROWS_OF_ROOM)
    with (
        traffic(subject.base, load, max_num_seqs=2, kv_cache_bytes=room) as cold,
        traffic(subject.base, load, max_num_seqs=2, kv_cache_bytes=room, prefix_cache="tenant") as warm,
    ):
        rigs = {"prefix computed": cold, "prefix reused": warm}
        for rig in rigs.values():
            first_token(rig, 2)
        variants = {name: partial(first_token, rig, plan.prefix_requests) for name, rig in rigs.items()}
        samples = interleave(variants, plan.prefix_rounds, tick)
    name = "first token, shared prefix reused ÷ computed"
    below, above = (f"{variant}.first token" for variant in variants)
    return [
        quantity(below, samples, "ms"),
        quantity(above, samples, "ms"),
        ratio(name, samples, above, below, goal(name, cuda=subject.is_cuda)),
    ]
