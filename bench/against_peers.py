"""The engine against transformers' `generate` and PEFT's `adapter_names`, end to end, on the same rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from bench.goals import goal
from bench.measurement import Entry, Variant, interleave, quantity, ratio
from bench.peers import StaticBatch, load_plain, with_adapters
from bench.plan import Plan
from bench.serving import Row, ServingRig, random_prompts, serving
from bench.subject import Subject

RATIOS = (
    ("engine base ÷ transformers generate", "engine base", "transformers generate"),
    ("engine 32 distinct ÷ PEFT adapter_names", "engine 32 distinct", "PEFT adapter_names"),
)


def measure(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """Tokens per second from the first request to the last token, prefill included, on both sides."""
    prompts = random_prompts(subject.sizes.vocabulary, plan.num_rows, 32, 64, seed=2)
    names = [str(i % len(subject.adapters)) for i in range(plan.num_rows)]
    alone = [Row(prompt) for prompt in prompts]
    mixed = [Row(prompt, name) for prompt, name in zip(prompts, names, strict=True)]
    # PEFT puts its layers into the model it is given, so transformers gets one of its own.
    plain = StaticBatch(load_plain(subject), prompts)
    peft = StaticBatch(with_adapters(load_plain(subject), subject, len(subject.adapters)), prompts, names)
    with serving(subject.base, subject.adapters, max_num_seqs=plan.num_rows) as rig:
        rig.run(mixed, 4)
        plain.run(2)
        peft.run(2)
        variants = {
            "engine base": _engine(rig, alone, plan.peer_tokens),
            "transformers generate": _static(plain, plan.peer_tokens),
            "engine 32 distinct": _engine(rig, mixed, plan.peer_tokens),
            "PEFT adapter_names": _static(peft, plan.peer_tokens),
        }
        samples = interleave(variants, plan.peer_rounds, tick)
    entries = [quantity(f"{name}.end to end", samples, "tokens/s") for name in variants]
    for name, above, below in RATIOS:
        target = goal(name, cuda=subject.is_cuda)
        entries.append(ratio(name, samples, f"{above}.end to end", f"{below}.end to end", target))
    return entries


def _engine(rig: ServingRig, rows: list[Row], num_tokens: int) -> Variant:
    def run() -> Mapping[str, float]:
        return {"end to end": rig.run(rows, num_tokens).tokens_per_second}

    return run


def _static(batch: StaticBatch, num_tokens: int) -> Variant:
    def run() -> Mapping[str, float]:
        start = time.perf_counter()
        return {"end to end": batch.run(num_tokens) / (time.perf_counter() - start)}

    return run
