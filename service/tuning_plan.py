"""From a job's hyperparameters, "auto" included, to what the trainer takes. Knows no tensors and no database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapters.errors import TrainingError
from adapters.peft_format import BaseSignature, LoraSpec
from adapters.recipe import (
    TrainConfig,
    auto_batch_size,
    auto_epochs,
    auto_eval_every,
    auto_learning_rate,
    steps_per_epoch,
)
from service.job import Hyperparameters

AUTO_PATIENCE = 8


@dataclass(frozen=True)
class TuningPlan:
    """What a run does, and how it reads in the API (`resolved`)."""

    spec: LoraSpec
    config: TrainConfig
    resolved: Mapping[str, Any]


def make_plan(
    asked: Hyperparameters,
    *,
    seed: int,
    num_examples: int,
    num_valid: int,
    base: BaseSignature,
    parent: LoraSpec | None,
) -> TuningPlan:
    """Fill every "auto". `parent` is the spec of the adapter that the run continues from.

    Raises:
        TrainingError: `invalid_hyperparameters`, the LoRA asked for is not the parent's.
    """
    spec = _spec(asked) if parent is None else _continued(asked, parent)
    num_parameters = sum(shape.in_features * shape.out_features for shape in base.modules.values())
    usual = auto_learning_rate(num_parameters)
    multiplier = 1.0 if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier
    learning_rate = usual * multiplier if asked.learning_rate == "auto" else asked.learning_rate
    num_epochs = auto_epochs(num_examples, num_parameters) if asked.n_epochs == "auto" else asked.n_epochs
    batch_size = auto_batch_size(num_examples) if asked.batch_size == "auto" else asked.batch_size
    num_steps = num_epochs * steps_per_epoch(num_examples, batch_size)
    patience = AUTO_PATIENCE if asked.early_stopping_patience == "auto" else asked.early_stopping_patience
    usual_every = auto_eval_every(num_steps, num_valid, batch_size)
    every = usual_every if asked.eval_every == "auto" else asked.eval_every
    config = TrainConfig(
        num_epochs=num_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        eval_every=every,
        patience=patience,
    )
    return TuningPlan(spec, config, _resolved(spec, config, learning_rate / usual))


def _spec(asked: Hyperparameters) -> LoraSpec:
    usual = LoraSpec()
    r = usual.r if asked.lora_r == "auto" else asked.lora_r
    return LoraSpec(
        r=r,
        lora_alpha=2.0 * r if asked.lora_alpha == "auto" else asked.lora_alpha,
        lora_dropout=usual.lora_dropout if asked.lora_dropout == "auto" else asked.lora_dropout,
        target_modules=asked.target_modules,
        use_rslora=asked.use_rslora,
    )


def _continued(asked: Hyperparameters, parent: LoraSpec) -> LoraSpec:
    """A run that continues an adapter keeps its shape; only dropout may be another."""
    wanted = _spec(asked)
    differs = (
        (asked.lora_r != "auto" and wanted.r != parent.r)
        or (asked.lora_alpha != "auto" and wanted.lora_alpha != parent.lora_alpha)
        or (asked.target_modules != "all-linear" and wanted.target_modules != parent.target_modules)
        or (asked.use_rslora and not parent.use_rslora)
    )
    if differs:
        raise TrainingError(
            f"the model that this job continues has r={parent.r}, lora_alpha={parent.lora_alpha:g},"
            f" use_rslora={parent.use_rslora}, target_modules={parent.target_modules}:"
            " leave these out, or start from the base",
            code="invalid_hyperparameters",
            param="hyperparameters",
        )
    return replace(parent, lora_dropout=wanted.lora_dropout)


def _resolved(spec: LoraSpec, config: TrainConfig, multiplier: float) -> dict[str, Any]:
    targets = spec.target_modules
    return {
        "n_epochs": config.num_epochs,
        "batch_size": config.batch_size,
        "learning_rate_multiplier": multiplier,
        "learning_rate": config.learning_rate,
        "lora_r": spec.r,
        "lora_alpha": spec.lora_alpha,
        "lora_dropout": spec.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "use_rslora": spec.use_rslora,
        "eval_every": config.eval_every,
        "early_stopping_patience": config.patience,
    }
