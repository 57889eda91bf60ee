"""How long streams without drift run until an alarm, and what conversations do to that. Knows no table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from adapters.drift.calibration import mean_run_length
from bench.drift.plan import Plan
from bench.drift.prompts import PromptEmbedder, Prompts
from bench.drift.streams import Indices, first_alarms, ratios, walks
from bench.drift.texts import Texts, distinct
from bench.drift.trial import Row, make_reference, trials


def control(plan: Plan, sources: Mapping[str, Texts], embedder: PromptEmbedder) -> list[Row]:
    """Random splits of a source: a row for each source and size, and one at the default promise."""
    rows = []
    for name, texts in sources.items():
        prompts = embedder.embed(texts)
        for size in plan.sizes:
            rows.append({"source": name} | _control(plan, prompts, size, plan.promise, plan.num_references))
        if len(rows) == len(plan.sizes):
            found = _control(plan, prompts, plan.size, plan.default_promise, plan.default_references)
            by_default = {"source": name} | found
    return [*rows, by_default]


def _control(plan: Plan, prompts: Prompts, size: int, promise: float, num_references: int) -> Row:
    rng = np.random.default_rng([plan.seed, size])
    num_steps = int(plan.horizon * promise)
    runs = []
    pool = np.arange(len(prompts))
    for trial in trials(rng, prompts, pool, size=size, promise=promise, count=num_references):
        streams = walks(rng, trial.rest, plan.num_streams, num_steps)
        runs.append(first_alarms(ratios(trial.reference, prompts, streams, rng)))
    return {"prompts": size, "promise": promise, **_summary(np.array(runs), num_steps, promise)}


def conversations(plan: Plan, dialogues: Sequence[Texts], embedder: PromptEmbedder) -> list[Row]:
    """Run lengths with and without the rule that a conversation counts once."""
    whole = dialogues[: plan.whole_conversations]
    texts = distinct([*(dialogue[:1] for dialogue in dialogues), *whole])
    prompts, place = embedder.embed(texts), {text: index for index, text in enumerate(texts)}
    first = np.array(sorted({place[dialogue[0]] for dialogue in dialogues}))
    turns = [np.array([place[text] for text in dialogue]) for dialogue in whole]
    num_steps = int(plan.horizon * plan.promise)
    once, thrice, all_turns = [], [], []
    rng = np.random.default_rng(plan.seed)
    count = plan.conversation_references
    for trial in trials(rng, prompts, first, size=plan.size, promise=plan.promise, count=count):
        streams = walks(rng, trial.rest, plan.num_streams, num_steps)
        again = np.repeat(streams, 3, axis=1)[:, :num_steps]
        once.append(first_alarms(ratios(trial.reference, prompts, streams, rng)))
        thrice.append(first_alarms(ratios(trial.reference, prompts, again, rng)))
    for seed in range(count):
        mine, others = np.split(rng.permutation(len(turns)), [len(turns) // 2])
        pool = np.unique(np.concatenate([turns[index] for index in mine]))
        reference = make_reference(prompts, rng.choice(pool, plan.size, replace=False), plan.promise, seed)
        streams = _told_in_order(rng, [turns[index] for index in others], plan.num_streams, num_steps)
        all_turns.append(first_alarms(ratios(reference, prompts, streams, rng)))
    kinds = {
        "the first turn of each conversation (the rule)": once,
        "the first turns, each sent three times": thrice,
        "all turns, one conversation after the other": all_turns,
    }
    return [{"observed": name, **_summary(np.array(runs), num_steps, plan.promise)} for name, runs in kinds.items()]


def _told_in_order(rng: np.random.Generator, dialogues: Sequence[Indices], num_streams: int, num_steps: int) -> Indices:
    """[streams, steps]: whole conversations in random order."""
    orders = walks(rng, np.arange(len(dialogues)), num_streams, num_steps)
    return np.stack([np.concatenate([dialogues[index] for index in order])[:num_steps] for order in orders])


def _summary(runs: Indices, num_steps: int, promise: float) -> Row:
    """runs: [references, streams]. `ratio`: the mean of all runs over the promise, `error`: its standard error over
    the references; `low` and `high`: 10 and 90 % of the references' own means."""
    means = np.minimum(runs, num_steps).mean(axis=1) / promise
    low, high = np.quantile(means, [0.1, 0.9])
    return {
        "ratio": mean_run_length(runs.ravel(), num_steps) / promise,
        "error": float(means.std() / np.sqrt(max(len(means) - 1, 1))),
        "low": float(low),
        "high": float(high),
        "references": runs.shape[0],
        "runs": runs.size,
    }
