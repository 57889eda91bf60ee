"""Decode throughput of the engine: base only, LoRA idle, one adapter, 8 and 32 distinct ones, on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bench.goals import goal
from bench.measurement import Entry, Variant, interleave, quantity, ratio
from bench.plan import Plan
from bench.serving import Row, ServingRig, random_prompts, serving
from bench.subject import Subject

RATIOS = (
    ("idle ÷ base", "idle", "base"),
    ("measured ÷ base", "measured", "base"),
    ("one ÷ base", "one", "base"),
    ("8 distinct ÷ base", "8 distinct", "base"),
    ("32 distinct ÷ base", "32 distinct", "base"),
    ("32 distinct ÷ one", "32 distinct", "one"),
)


def measure(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """Tokens per second while all rows decode, prefill left out.

    "base" is an engine that never met an adapter; "idle" has all of them in its slots and uses none; "measured" is
    "base" with every answer measured for drift.
    """
    prompts = random_prompts(subject.sizes.vocabulary, plan.num_rows, 32, 64, seed=1)
    num_adapters = len(subject.adapters)
    alone = [Row(prompt) for prompt in prompts]
    mixes = {
        "idle": alone,
        "one": [Row(prompt, "0") for prompt in prompts],
        "8 distinct": [Row(prompt, str(i % min(8, num_adapters))) for i, prompt in enumerate(prompts)],
        "32 distinct": [Row(prompt, str(i % num_adapters)) for i, prompt in enumerate(prompts)],
    }
    with (
        serving(subject.base, {}, max_num_seqs=plan.num_rows) as plain,
        serving(subject.base, subject.adapters, max_num_seqs=plan.num_rows) as loaded,
    ):
        plain.run(alone, 4)
        loaded.run(mixes["32 distinct"], 4)
        variants = {"base": _variant(plain, alone, plan.decode_tokens)}
        variants["measured"] = _variant(plain, alone, plan.decode_tokens, measure=True)
        variants |= {name: _variant(loaded, rows, plan.decode_tokens) for name, rows in mixes.items()}
        samples = interleave(variants, plan.decode_rounds, tick)
    entries = [quantity(f"{name}.decode", samples, "tokens/s") for name in variants]
    for name, above, below in RATIOS:
        entries.append(ratio(name, samples, f"{above}.decode", f"{below}.decode", goal(name, cuda=subject.is_cuda)))
    return entries


def _variant(rig: ServingRig, rows: list[Row], num_tokens: int, *, measure: bool = False) -> Variant:
    def run() -> Mapping[str, float]:
        return {"decode": rig.run(rows, num_tokens, measure=measure).decode_tokens_per_second}

    return run
