"""From a job's method, preset and hyperparameters to what the trainer takes: no "auto" is left. Knows no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from adapters.errors import TrainingError
from adapters.lora_weights import BaseSignature, LoraSpec
from adapters.rate_probe import ProbeResult
from adapters.recipe import (
    Schedule,
    TrainConfig,
    auto_batch_size,
    auto_epochs,
    auto_eval_every,
    auto_learning_rate,
    steps_per_epoch,
)
from service.job import Hyperparameters, JobSpec, Method
from service.presets import PRESETS, Choices, attention_modules

AUTO_BETA = 0.1
DPO_RATE_SHARE = 0.25
"""Of the learning rate for imitation: a preference run starts from weights that already answer, and soon overshoots."""
DPO_EPOCHS_SHARE = 0.5

T = TypeVar("T", int, float, str)


@dataclass(frozen=True)
class TuningPlan:
    """What a run does, and how it reads in the API (`resolved`). `probes`: its learning rate is only the middle one."""

    spec: LoraSpec
    config: TrainConfig
    probes: bool
    usual_learning_rate: float
    probe: ProbeResult | None = None

    def probed(self, probe: ProbeResult) -> TuningPlan:
        return replace(self, config=replace(self.config, learning_rate=probe.chosen), probes=False, probe=probe)

    @property
    def resolved(self) -> Mapping[str, Any]:
        config, spec = self.config, self.spec
        values: dict[str, Any] = {
            "n_epochs": config.num_epochs,
            "batch_size": config.batch_size,
            "learning_rate_multiplier": config.learning_rate / self.usual_learning_rate,
            "learning_rate": "probe" if self.probes else config.learning_rate,
            "lora_r": spec.r,
            "lora_alpha": spec.lora_alpha,
            "lora_dropout": spec.lora_dropout,
            "target_modules": spec.target_modules if isinstance(spec.target_modules, str) else [*spec.target_modules],
            "layers_to_transform": None if spec.layers_to_transform is None else [*spec.layers_to_transform],
            "use_rslora": spec.use_rslora,
            "schedule": config.schedule.value,
            "warmup_ratio": config.warmup_ratio,
            "weight_decay": config.weight_decay,
            "kl_to_base": config.kl_to_base,
            "beta": config.beta,
            "activation_checkpointing": "auto" if config.recompute_layers is None else config.recompute_layers,
            "eval_every": config.eval_every,
            "early_stopping_patience": config.patience,
        }
        if self.probe is not None:
            values["learning_rate_probe"] = {
                "learning_rates": list(self.probe.rates),
                "valid_losses": list(self.probe.losses),
                "steps": self.probe.num_steps,
            }
        return values


def make_plan(
    job: JobSpec,
    *,
    num_examples: int,
    num_valid: int,
    base: BaseSignature,
    max_rank: int,
    parent: LoraSpec | None,
) -> TuningPlan:
    """Fill every "auto". `parent` is the spec of the adapter that the run continues from.

    Raises:
        TrainingError: `invalid_hyperparameters`, the LoRA asked for is not the parent's.
    """
    asked, choices, is_dpo = job.hyperparameters, PRESETS[job.preset], job.method is Method.DPO
    spec = _spec(asked, choices, base, max_rank) if parent is None else _continued(asked, choices, parent)
    num_parameters = sum(shape.in_features * shape.out_features for shape in base.modules.values())
    usual_rate = auto_learning_rate(num_parameters) * (DPO_RATE_SHARE if is_dpo else 1.0)
    middle_rate = usual_rate * _or(asked.learning_rate_multiplier, 1.0)
    epochs_share = choices.epochs_share * (DPO_EPOCHS_SHARE if is_dpo else 1.0)
    num_epochs = _or(asked.n_epochs, auto_epochs(num_examples, num_parameters, epochs_share))
    batch_size = _or(asked.batch_size, auto_batch_size(num_examples))
    num_steps = num_epochs * steps_per_epoch(num_examples, batch_size)
    usual_every = auto_eval_every(num_steps, num_valid, batch_size, choices.evaluations)
    checkpointing, patience = asked.activation_checkpointing, asked.early_stopping_patience
    config = TrainConfig(
        num_epochs=num_epochs,
        batch_size=batch_size,
        learning_rate=middle_rate if isinstance(asked.learning_rate, str) else asked.learning_rate,
        seed=job.seed,
        eval_every=_or(asked.eval_every, usual_every),
        patience=choices.patience if patience == "auto" else patience,
        schedule=Schedule(_or(asked.schedule, choices.schedule.value)),
        warmup_ratio=_or(asked.warmup_ratio, choices.warmup_ratio),
        weight_decay=_or(asked.weight_decay, choices.weight_decay),
        beta=_or(asked.beta, AUTO_BETA) if is_dpo else None,
        kl_to_base=_or(asked.kl_to_base, 0.0),
        recompute_layers=None if checkpointing == "auto" else checkpointing,
    )
    return TuningPlan(spec, config, _probes(asked, choices), usual_rate)


def _probes(asked: Hyperparameters, choices: Choices) -> bool:
    """A rate or a multiplier that is given is a decision, also under a preset that would rather try three."""
    if asked.learning_rate == "auto":
        return choices.probes_learning_rate and asked.learning_rate_multiplier == "auto"
    return asked.learning_rate == "probe"


def _spec(asked: Hyperparameters, choices: Choices, base: BaseSignature, max_rank: int) -> LoraSpec:
    r = _or(asked.lora_r, min(choices.lora_r, max_rank))
    targets = asked.target_modules
    if targets == "auto":
        targets = attention_modules(base) if choices.targets == "attention" else "all-linear"
    return LoraSpec(
        r=r,
        lora_alpha=_or(asked.lora_alpha, 2.0 * r),
        lora_dropout=_or(asked.lora_dropout, choices.lora_dropout),
        target_modules=targets,
        use_rslora=asked.use_rslora,
        layers_to_transform=asked.layers_to_transform,
    )


def _continued(asked: Hyperparameters, choices: Choices, parent: LoraSpec) -> LoraSpec:
    """A run that continues an adapter keeps its shape, whatever the preset; only dropout may be another."""
    targets = asked.target_modules
    differs = (
        asked.lora_r not in ("auto", parent.r)
        or asked.lora_alpha not in ("auto", parent.lora_alpha)
        or (isinstance(targets, tuple) and set(targets) != _names(parent))
        or asked.layers_to_transform not in (None, parent.layers_to_transform)
        or (asked.use_rslora and not parent.use_rslora)
    )
    if differs:
        layers = "all" if parent.layers_to_transform is None else list(parent.layers_to_transform)
        raise TrainingError(
            f"the model that this job continues has r={parent.r}, lora_alpha={parent.lora_alpha:g},"
            f" use_rslora={parent.use_rslora}, target_modules={parent.target_modules}, layers_to_transform={layers}:"
            " leave these out, or start from the base",
            code="invalid_hyperparameters",
            param="hyperparameters",
        )
    return replace(parent, lora_dropout=_or(asked.lora_dropout, choices.lora_dropout))


def _names(spec: LoraSpec) -> set[str]:
    return {spec.target_modules} if isinstance(spec.target_modules, str) else set(spec.target_modules)


def _or(asked: T | str, usual: T) -> T:
    """What was asked for, or the usual value where that is "auto"."""
    return usual if asked == "auto" else asked  # type: ignore[return-value]
