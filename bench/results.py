"""One run's results as a file: `bench/results/<date>-<machine kind>.json`. Knows no terminal and no document.

The machine is described by what explains its speed; no host name, no path.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.measurement import Entry

DIRECTORY = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Results:
    """`sections` holds the entries by the name of their measurement."""

    date: str
    quick: bool
    machine: Mapping[str, Any]
    plan: Mapping[str, Any]
    sections: Mapping[str, Sequence[Entry]]

    @property
    def file_name(self) -> str:
        return f"{self.date}-{self.machine['kind']}.json"

    def as_dict(self) -> dict[str, Any]:
        return {
            "date": self.date,
            "quick": self.quick,
            "machine": dict(self.machine),
            "plan": {name: list(v) if isinstance(v, tuple) else v for name, v in self.plan.items()},  # as JSON has it
            "sections": {name: [_entry(entry) for entry in entries] for name, entries in self.sections.items()},
        }

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / self.file_name
        path.write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n")
        return path


def collect(plan: object, quick: bool, sections: Mapping[str, Sequence[Entry]]) -> Results:
    """`plan` is a frozen dataclass: the sizes that were measured."""
    return Results(
        date=datetime.now(UTC).date().isoformat(),
        quick=quick,
        machine=machine(),
        plan=asdict(plan),  # type: ignore[call-overload]
        sections=sections,
    )


def newest(directory: Path = DIRECTORY) -> dict[str, Any] | None:
    """The file of the latest date, as it was written; None when there is none."""
    paths = sorted(directory.glob("*.json"), key=lambda path: path.name)
    return json.loads(paths[-1].read_text()) if paths else None


def machine() -> dict[str, Any]:
    """What explains the speed. `kind` is short enough for a file name."""
    found: dict[str, Any] = {
        "kind": f"cpu-{os.cpu_count()}",
        "device": "cpu",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        found |= {"kind": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), "device": name}
    return found


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.+)$", text, re.MULTILINE)
    fast = " with AVX512-BF16" if flags and "avx512_bf16" in flags[1].split() else ""
    return (model[1] if model else platform.machine()) + fast


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "value": entry.value,
        "low": entry.low,
        "high": entry.high,
        "unit": entry.unit,
        "rounds": entry.num_rounds,
        "ratio": entry.ratio,
        "goal": str(entry.goal) if entry.goal else None,
        "met": entry.goal.met(entry.value) if entry.goal else None,
        "reference": entry.goal.reference if entry.goal else None,
    }
