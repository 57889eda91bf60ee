"""All measurements, one after the other, on one base. Knows no terminal beyond a line of progress."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from bench import against_peers, co_serving, decode, estimates, multi_job, prefix, streaming, tiers, training, watching
from bench.measurement import Entry
from bench.plan import Plan
from bench.subject import Subject, prepare

Measurement = Callable[[Subject, Plan, Callable[[str], None]], list[Entry]]

MEASUREMENTS: dict[str, tuple[str, Measurement]] = {
    "decode": ("Many adapters in one batch", decode.measure),
    "peers": ("Against transformers and PEFT", against_peers.measure),
    "http": ("Through HTTP", streaming.measure),
    "prefix": ("A beginning that prompts share", prefix.measure),
    "tiers": ("More adapters than slots, more requests than seats", tiers.measure),
    "training": ("Training", training.measure),
    "drift": ("Watching for drift", watching.measure),
    "jobs": ("Several training jobs at once", multi_job.measure),
    "estimates": ("Estimates of a run", estimates.measure),
    "co-serving": ("Training beside serving", co_serving.measure),
}
"""By the name that `--only` takes: title and function."""


def run(plan: Plan, only: Collection[str], tick: Callable[[str], None]) -> dict[str, list[Entry]]:
    """Entries by the title of their measurement; `only` empty means all."""
    with tempfile.TemporaryDirectory(prefix="rootstock-bench-base-") as directory:
        tick("writing and loading the base")
        subject = prepare(Path(directory), plan.sizes, plan.num_rows)
        return {
            title: measure(subject, plan, lambda step, title=title: tick(f"{title}: {step}"))  # type: ignore[misc]
            for name, (title, measure) in MEASUREMENTS.items()
            if not only or name in only
        }
