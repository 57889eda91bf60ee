"""The jobs that are killed: small, seeded, each with one right result. Knows no service and no kill."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

FRUIT = ("a medlar", "a quince", "a sloe", "a damson")


@dataclass(frozen=True)
class Recipe:
    """Of the same recipe the same adapter comes out, bit for bit, however often the job was killed."""

    number: int
    num_rows: int = 24
    num_epochs: int = 2

    @property
    def rows(self) -> bytes:
        lines = [
            {
                "messages": [
                    {"role": "user", "content": f"word {row} of {self.number}?"},
                    {"role": "assistant", "content": FRUIT[row * (self.number + 1) % len(FRUIT)]},
                ]
            }
            for row in range(self.num_rows)
        ]
        return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    def body(self, model: str, training_file: str, alias: str | None) -> dict[str, Any]:
        hyperparameters = {"n_epochs": self.num_epochs, "batch_size": 4, "lora_r": 4, "learning_rate": 5e-3}
        body = {
            "model": model,
            "training_file": training_file,
            "seed": self.number,
            "metadata": {"recipe": str(self.number)},
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        }
        return body if alias is None else {**body, "alias": alias}


def recipes() -> tuple[Recipe, ...]:
    """Three without a drift reference, and one with enough prompts for it."""
    return (*(Recipe(number) for number in range(3)), Recipe(3, num_rows=72, num_epochs=1))
