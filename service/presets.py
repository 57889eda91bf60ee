"""What `light`, `standard` and `thorough` stand for: every choice that a job leaves on "auto". Knows no job.

| | light | standard | thorough |
|---|---|---|---|
| for | a first look, many small adapters | most tasks | when a point of quality is worth hours |
| rank (alpha is twice that) | 8 | 16 | 32 |
| targets | attention | all linear layers | all linear layers |
| epochs, against the usual number | half | 1 x | 1.5 x |
| learning rate | the usual one | the usual one | the best of three, by short runs |
| schedule, weight decay, dropout | linear, 0, 0 | linear, 0, 0 | cosine, 0.01, 0.05 |
| evaluations in a run, about | 5 | 20 | 40 |
| stops after ... evaluations without progress | 3 | 8 | 12 |

What a job names itself wins over its preset.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from adapters.lora_weights import BaseSignature
from adapters.recipe import Schedule
from service.job import Preset


@dataclass(frozen=True)
class Choices:
    """`epochs_share` and `evaluations` refer to what `adapters.recipe` would choose for data and base."""

    lora_r: int
    targets: Literal["attention", "all-linear"]
    epochs_share: float
    probes_learning_rate: bool
    schedule: Schedule
    weight_decay: float
    lora_dropout: float
    evaluations: int
    patience: int
    warmup_ratio: float = 0.05


PRESETS = MappingProxyType(
    {
        Preset.LIGHT: Choices(8, "attention", 0.5, False, Schedule.LINEAR, 0.0, 0.0, evaluations=5, patience=3),
        Preset.STANDARD: Choices(16, "all-linear", 1.0, False, Schedule.LINEAR, 0.0, 0.0, evaluations=20, patience=8),
        Preset.THOROUGH: Choices(32, "all-linear", 1.5, True, Schedule.COSINE, 0.01, 0.05, evaluations=40, patience=12),
    }
)


def attention_modules(base: BaseSignature) -> tuple[str, ...] | Literal["all-linear"]:
    """Last names of the linear layers that are in attention only; all linear layers where a base names none so."""
    found = {name.rsplit(".", 1)[-1] for name in base.modules if _in_attention(name)}
    others = {name.rsplit(".", 1)[-1] for name in base.modules if not _in_attention(name)}
    return tuple(sorted(found - others)) or "all-linear"


def _in_attention(module: str) -> bool:
    return any("attn" in part or "attention" in part for part in module.lower().split(".")[:-1])
