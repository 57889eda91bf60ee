"""How soon a shift is found, by the monitor and by usual tests on disjoint windows. Knows no table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from adapters.drift.calibration import mean_run_length
from adapters.drift.reference import DriftReference
from bench.drift.peers import TESTS
from bench.drift.plan import Plan
from bench.drift.prompts import PromptEmbedder
from bench.drift.streams import Indices, first_alarms, ratios, walks
from bench.drift.texts import Shift
from bench.drift.trial import Row, ShiftedPrompts, trials

WINDOW = 64
USUAL_P = 0.05


def delays(plan: Plan, shifts: Sequence[Shift], embedder: PromptEmbedder) -> list[Row]:
    """A row for each shift and share of shifted prompts, at the default promise. Streams with an alarm before the
    change are left out."""
    rows: list[Row] = []
    for shift in shifts:
        rng = np.random.default_rng([plan.seed, len(rows)])
        shifted = ShiftedPrompts.of(shift, embedder)
        found: dict[float, list[Indices]] = {share: [] for share in plan.shares}
        for reference, before, after in _references(plan, rng, shifted, plan.default_promise, plan.delay_references):
            for share in plan.shares:
                streams = _mixed(rng, before, after, share, plan.delay_streams, plan.quiet, plan.delay)
                alarms = first_alarms(ratios(reference, shifted.prompts, streams, rng))
                found[share].append(alarms[alarms > plan.quiet] - plan.quiet)
        rows += [{"shift": shift.name, "share": share, **_delay(plan, runs)} for share, runs in found.items()]
    return rows


def peers(plan: Plan, shifts: Sequence[Shift], embedder: PromptEmbedder) -> list[Row]:
    """Usual tests on disjoint windows of 64 prompts, at two levels of p: run length without drift, median delays."""
    levels = {"0.05": USUAL_P, f"64 / {plan.default_promise:.0f}": WINDOW / plan.default_promise}
    rows: list[Row] = []
    for shift in shifts:
        rng = np.random.default_rng([plan.seed, len(rows)])
        shifted = ShiftedPrompts.of(shift, embedder)
        values: dict[tuple[str, float], list[NDArray[np.float64]]] = {}
        for reference, before, after in _references(plan, rng, shifted, plan.promise, plan.peer_references):
            points = reference.project(shifted.prompts.embeddings)
            for share in plan.shares:
                num_windows = plan.peer_windows if share == 0 else plan.delay // WINDOW
                streams = _mixed(rng, before, after, share, plan.peer_streams, 0, num_windows * WINDOW)
                windows = points[streams].reshape(-1, WINDOW, points.shape[1])
                for name, test in TESTS.items():
                    found = test(reference.points, windows, rng).reshape(plan.peer_streams, num_windows)
                    values.setdefault((name, share), []).append(found)
        for name in TESTS:
            for said, level in levels.items():
                alarms = {share: np.concatenate(values[name, share]) < level for share in plan.shares}
                rows.append({"shift": shift.name, "test": name, "level": said, **_peer(alarms, level)})
    return rows


def _references(
    plan: Plan, rng: np.random.Generator, shifted: ShiftedPrompts, promise: float, count: int
) -> Iterator[tuple[DriftReference, Indices, Indices]]:
    """With new prompts from before and after the change."""
    for trial in trials(rng, shifted.prompts, shifted.before, size=plan.size, promise=promise, count=count):
        yield trial.reference, trial.rest, np.setdiff1d(shifted.after, trial.chosen)


def _mixed(
    rng: np.random.Generator, before: Indices, after: Indices, share: float, num_streams: int, quiet: int, delay: int
) -> Indices:
    """[streams, quiet + delay]: after the quiet part each prompt is a shifted one with the chance `share`."""
    streams = walks(rng, before, num_streams, quiet + delay)
    shifted = rng.random(streams.shape) < share
    shifted[:, :quiet] = False
    streams[shifted] = walks(rng, after, num_streams, quiet + delay)[shifted]
    return streams


def _delay(plan: Plan, runs: Sequence[Indices]) -> Row:
    """`median`, `low` (10 %) and `high` (90 %) are None where the change was not found in time."""
    found = np.concatenate(runs)
    if not len(found):
        raise SystemExit(f"no stream was quiet for {plan.quiet} prompts: ask for more of them")
    quantiles = (int(value) for value in np.quantile(found, [0.1, 0.5, 0.9], method="higher"))
    low, median, high = (value if value <= plan.delay else None for value in quantiles)
    detected = float((found <= plan.delay).mean())
    return {"median": median, "low": low, "high": high, "detected": detected, "runs": len(found)}


def _peer(alarms: dict[float, NDArray[np.bool_]], level: float) -> Row:
    """alarms: [streams, windows] by share. The nominal run length is what the level would give were p exact."""
    row: Row = {"nominal": WINDOW / level, "delays": {}}
    for share, found in alarms.items():
        num_windows = found.shape[1]
        first = np.where(found.any(axis=1), found.argmax(axis=1) + 1, num_windows + 1)
        if share == 0:
            row["run_length"] = WINDOW * mean_run_length(first, num_windows)
            row["rate"] = float(found.mean())
        else:
            median = int(np.quantile(first, 0.5, method="higher"))
            row["delays"][f"{share:.0%}"] = median * WINDOW if median <= num_windows else None
    return row
