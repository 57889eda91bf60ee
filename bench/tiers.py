"""More adapters than slots, adapters that swap under running answers, and a tenant that floods."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from bench.goals import goal
from bench.measurement import Entry, interleave, quantity, ratio
from bench.plan import Plan
from bench.registered import Registered, registered
from bench.serving import Row, random_prompts
from bench.subject import Subject
from bench.traffic import Client, TrafficRig, p99, traffic

FEW = 5
NUM_CLIENTS = 16
NUM_DECODING = 8
"""Answers that run while others' adapters are swapped."""

ANSWER_TOKENS = 16
SHORT_ANSWER_TOKENS = 4
LONG_ANSWER_TOKENS = 400

SMALL_TENANTS = {"1 client": (1, SHORT_ANSWER_TOKENS), "8 clients": (8, ANSWER_TOKENS)}
"""Who is flooded: how many ask at once, and for how many tokens."""


def measure(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    entries = []
    for one in (_many_registered, _working_set, _swaps, _flood):
        entries += one(subject, plan, tick)
    return entries


def _many_registered(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """Tokens per second of 16 clients whose adapters follow a power law, by way of registry, store and all tiers."""
    prompts = random_prompts(subject.sizes.vocabulary, 64, 32, 64, seed=5)
    with ExitStack() as stack:
        variants = {}
        for num in (FEW, plan.tier_registered):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rootstock-bench-store-")))
            tick(f"making {num} adapters")
            models = stack.enter_context(registered(subject, directory, num))
            rig = stack.enter_context(traffic(subject.base, models.load))
            _power_law(rig, models, prompts, num, 2 * NUM_CLIENTS)()
            variants[f"{num} registered"] = _power_law(rig, models, prompts, num, plan.tier_requests)
        samples = interleave(variants, plan.tier_rounds, tick)
    name = f"{plan.tier_registered} registered ÷ {FEW} registered"
    above, below = (f"{num} registered.throughput" for num in (plan.tier_registered, FEW))
    return [
        quantity(above, samples, "tokens/s"),
        quantity(below, samples, "tokens/s"),
        ratio(name, samples, above, below, goal(name, cuda=subject.is_cuda)),
    ]


def _power_law(
    rig: TrafficRig, models: Registered, prompts: list[tuple[int, ...]], num: int, num_requests: int
) -> Callable[[], Mapping[str, float]]:
    weights = [1 / (rank + 1) for rank in range(num)]
    rng = random.Random(num)

    def rows() -> Iterator[Row]:
        for _ in range(num_requests // NUM_CLIENTS):
            yield Row(rng.choice(prompts), models.digest(rng.choices(range(num), weights)[0]))

    def run() -> Mapping[str, float]:
        clients = [Client(rows(), ANSWER_TOKENS) for _ in range(NUM_CLIENTS)]
        return {"throughput": rig.converse(clients).tokens_per_second}

    return run


def _working_set(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """Median time to first token of 16 clients on 16 slots, asking for 16 adapters or 32 in random order."""
    prompts = random_prompts(subject.sizes.vocabulary, 64, 32, 64, seed=6)
    rng = random.Random(6)

    def first_token(rig: TrafficRig, num_adapters: int, num_requests: int) -> Mapping[str, float]:
        def rows() -> Iterator[Row]:
            for _ in range(num_requests // NUM_CLIENTS):
                yield Row(rng.choice(prompts), str(rng.randrange(num_adapters)))

        clients = [Client(rows(), ANSWER_TOKENS) for _ in range(NUM_CLIENTS)]
        return {"first token": rig.converse(clients).median_first_token_ms}

    with traffic(
        subject.base, subject.adapters.__getitem__, max_num_seqs=NUM_CLIENTS, max_lora_slots=NUM_CLIENTS
    ) as rig:
        first_token(rig, 2 * NUM_CLIENTS, 2 * NUM_CLIENTS)
        variants = {
            f"{times} per slot": partial(first_token, rig, times * NUM_CLIENTS, plan.tier_requests) for times in (1, 2)
        }
        samples = interleave(variants, plan.tier_rounds, tick)
    name, above, below = (
        "first token, 2 adapters per slot ÷ 1",
        *(f"{times} per slot.first token" for times in (2, 1)),
    )
    return [
        quantity(below, samples, "ms"),
        quantity(above, samples, "ms"),
        ratio(name, samples, above, below, goal(name, cuda=subject.is_cuda)),
    ]


def _swaps(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """p99 between the tokens of 8 running answers, while short requests use one adapter, or ever others.

    Host memory is kept too small as well, so every swap reads, packs and fills.
    """
    prompts = random_prompts(subject.sizes.vocabulary, NUM_DECODING + 8, 32, 64, seed=7)
    names = list(subject.adapters)
    used, others = names[:NUM_DECODING], names[NUM_DECODING:]
    decoding = list(zip(prompts, used, strict=False))

    def between_tokens(rig: TrafficRig, adapters: list[str], num_requests: int) -> Mapping[str, float]:
        visits = (Row(prompts[NUM_DECODING + i % 8], name) for i, name in enumerate(cycle(adapters)))
        visitor = Client(islice(visits, num_requests), 2)
        background = [Client(cycle([Row(*row)]), LONG_ANSWER_TOKENS) for row in decoding]
        answers = rig.converse([visitor], background).background
        return {"p99": p99([gap for answer in answers for gap in answer.inter_token_seconds]) * 1e3}

    with traffic(
        subject.base,
        subject.adapters.__getitem__,
        max_num_seqs=NUM_DECODING + 2,
        max_lora_slots=NUM_DECODING + 2,
        max_host_adapters=4,
    ) as rig:
        between_tokens(rig, others, 4)
        variants = {
            "no swaps": partial(between_tokens, rig, others[:1], plan.tier_requests // 2),
            "swaps": partial(between_tokens, rig, others, plan.tier_requests // 2),
        }
        samples = interleave(variants, plan.tier_rounds, tick)
    name = "p99 between tokens during swaps ÷ before"
    return [
        quantity("no swaps.p99", samples, "ms"),
        quantity("swaps.p99", samples, "ms"),
        ratio(name, samples, "swaps.p99", "no swaps.p99", goal(name, cuda=subject.is_cuda)),
    ]


def _flood(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """p99 time to first token of a tenant, alone and beside one that keeps 96 long requests in the engine."""
    prompts = random_prompts(subject.sizes.vocabulary, 64, 32, 64, seed=8)
    rng = random.Random(8)

    def rows(num: int | None) -> Iterator[Row]:
        return (Row(rng.choice(prompts), str(rng.randrange(len(subject.adapters)))) for _ in _times(num))

    def first_token(rig: TrafficRig, small: tuple[int, int], num_flooding: int) -> Mapping[str, float]:
        num_clients, num_tokens = small
        each = plan.tier_requests // 8
        mine = [
            Client(rows(max(each, plan.tier_small_requests // num_clients)), num_tokens, "small")
            for _ in range(num_clients)
        ]
        flood = [Client(rows(None), LONG_ANSWER_TOKENS, "flood") for _ in range(num_flooding)]
        return {"first token p99": rig.converse(mine, flood).p99_first_token_ms}

    with traffic(subject.base, subject.adapters.__getitem__, max_num_seqs=plan.num_rows) as rig:
        rig.converse([Client(rows(2), ANSWER_TOKENS) for _ in range(plan.num_rows)])
        variants = {}
        for name, small in SMALL_TENANTS.items():
            variants[f"{name}, alone"] = partial(first_token, rig, small, 0)
            variants[f"{name}, beside a flood"] = partial(first_token, rig, small, 3 * plan.num_rows)
        samples = interleave(variants, plan.tier_rounds, tick)
    entries = [quantity(f"{name}.first token p99", samples, "ms") for name in variants]
    for name in SMALL_TENANTS:
        above, below = f"{name}, beside a flood.first token p99", f"{name}, alone.first token p99"
        title = f"p99 first token beside a flood ÷ alone, {name}"
        entries.append(ratio(title, samples, above, below, goal(title, cuda=subject.is_cuda)))
    return entries


def _times(num: int | None) -> Iterator[None]:
    """So often, or without end."""
    endless = cycle([None])
    return endless if num is None else islice(endless, num)
