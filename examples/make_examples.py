"""Writes the three tenants' example sets: `python -m examples.make_examples`. The same bytes on every run."""

from __future__ import annotations

from pathlib import Path

from examples.copper_kettle import copper_kettle
from examples.example_set import ExampleSet
from examples.harbour_bank import harbour_bank
from examples.lantern_hotels import lantern_hotels

DIRECTORY = Path(__file__).resolve().parent


def example_sets() -> tuple[ExampleSet, ...]:
    """The tenants of the demo, in the order it shows them."""
    return harbour_bank(), lantern_hotels(), copper_kettle()


def write_examples(directory: Path) -> list[Path]:
    """Write `<tenant>/<split>.jsonl` under `directory`; returns the paths."""
    paths = []
    for example_set in example_sets():
        for name, text in example_set.files().items():
            path = directory / example_set.tenant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            paths.append(path)
    return paths


if __name__ == "__main__":
    for written in write_examples(DIRECTORY):
        print(written.relative_to(DIRECTORY.parent))
