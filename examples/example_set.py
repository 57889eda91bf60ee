"""What one tenant's example set is made of, and how its rows fall into files. Knows no tenant in particular.

Rows come from templates times vocabulary. A row's `pairing` names the template and the slot values that meet
in it; whole pairings are dealt to one file each, so a held-out row shows words and templates that training
has seen, but never together. Dealing goes by SHA-256, hence is the same on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

SPLITS = {"train": 240, "validation": 30, "heldout": 60}
"""Rows of each file: learned from, watched while learning, and never shown until the comparison."""


@dataclass(frozen=True)
class Row:
    """One exchange: what the tenant's user writes, what the tenant wants answered."""

    pairing: str
    question: str
    answer: str


@dataclass(frozen=True)
class ExampleSet:
    """One tenant: its name, the instruction every row carries, and every row its templates can make."""

    tenant: str
    instruction: str
    rows: tuple[Row, ...]

    def files(self) -> dict[str, str]:
        """File name -> chat JSONL text, one file per split. Raises ValueError if the templates are too few."""
        dealt = self._deal()
        return {
            f"{split}.jsonl": "".join(self._line(row) for row in _balanced(dealt[split], size))
            for split, size in SPLITS.items()
        }

    def _deal(self) -> dict[str, list[Row]]:
        """Every row to the split its pairing falls in: eight of ten to training, one each to the others."""
        dealt: dict[str, list[Row]] = {split: [] for split in SPLITS}
        for row in self.rows:
            tenth = _order(f"{self.tenant}/{row.pairing}") % 10
            dealt["validation" if tenth == 8 else "heldout" if tenth == 9 else "train"].append(row)
        return dealt

    def _line(self, row: Row) -> str:
        messages = [
            {"role": "system", "content": self.instruction},
            {"role": "user", "content": row.question},
            {"role": "assistant", "content": row.answer},
        ]
        return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def _balanced(rows: Iterable[Row], size: int) -> list[Row]:
    """`size` rows that visit the pairings in turn, so that no template outweighs another."""
    queues: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: _order(row.question)):
        queues.setdefault(row.pairing, []).append(row)
    turns = [(turn, _order(row.pairing), row) for queue in queues.values() for turn, row in enumerate(queue)]
    if len(turns) < size:
        raise ValueError(f"the templates make {len(turns)} rows where {size} are wanted")
    chosen = [row for _, _, row in sorted(turns, key=lambda entry: entry[:2])[:size]]
    return sorted(chosen, key=lambda row: _order(row.question))


def _order(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big")
