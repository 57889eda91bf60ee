"""How a run tells of itself: metrics, messages and the result file. Knows no queue and no tensors."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from math import isfinite
from typing import Any

from adapters.evaluation_report import ACTIVE, BASE, CANDIDATE, FEW_SHOT, EvaluationReport, Forgetting
from adapters.packed_loss import Score
from adapters.rate_probe import ProbeResult
from adapters.trainer import StepResult, Trainer

METRIC_NAMES = {"accuracy": "Accuracy", "exact_match": "Exact match", "chrf": "chrF"}


def step_metrics(trainer: Trainer, result: StepResult, score: Score | None, *, whole: bool) -> dict[str, Any]:
    """Data of a metrics event, in OpenAI's names; `whole` adds `full_valid_*`.

    An evaluation always covers all validation examples, so both pairs are the same numbers. A run on pairs has
    `preference_accuracy` and `reward_margin` where others have `mean_token_accuracy`.
    """
    metrics = {
        "step": result.step,
        "total_steps": trainer.num_steps,
        "train_loss": _finite(result.loss),
        **_quality("train", result),
        **score_metrics(score),
    }
    if result.kl is not None:
        metrics["train_kl_to_base"] = _finite(result.kl)
    if whole and score is not None:
        metrics |= {"full_" + name: value for name, value in score_metrics(score).items()}
    return metrics


def score_metrics(score: Score | None) -> dict[str, float | None]:
    if score is None:
        return {}
    return {"valid_loss": _finite(score.loss), **_quality("valid", score)}


def _quality(kind: str, found: StepResult | Score) -> dict[str, float | None]:
    if found.margin is None:
        return {f"{kind}_mean_token_accuracy": found.accuracy}
    return {f"{kind}_preference_accuracy": found.accuracy, f"{kind}_reward_margin": _finite(found.margin)}


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if isfinite(value) else None


def step_message(metrics: Mapping[str, Any]) -> str:
    words = {
        "training loss": "train_loss",
        "validation loss": "valid_loss",
        "full validation loss": "full_valid_loss",
    }
    told = [f"{name}={metrics[key]:.2f}" for name, key in words.items() if metrics.get(key) is not None]
    return f"Step {metrics['step']}/{metrics['total_steps']}: " + ", ".join(told)


def probe_message(result: ProbeResult) -> str:
    tried = ", ".join(
        f"{rate:.2g}: {'not finite' if loss is None else f'{loss:.3f}'}"
        for rate, loss in zip(result.rates, result.losses, strict=True)
    )
    return f"Learning rate {result.chosen:.2g} chosen; validation loss after {result.num_steps} steps: {tried}"


def evaluation_message(report: EvaluationReport) -> str:
    """The primary metric of everybody, with the 95 % interval of the new model."""
    names = {
        BASE: "base",
        FEW_SHOT: f"{report.num_shots}-shot prompt",
        ACTIVE: "active version",
        CANDIDATE: "this model",
    }
    found = {name: report.scores[name][report.primary] for name in names if name in report.scores}
    told = ", ".join(f"{names[name]} {estimate.value:.0%}" for name, estimate in found.items())
    metric = METRIC_NAMES.get(report.primary, report.primary)
    mine = found[CANDIDATE]
    return (
        f"{metric} on {report.num_examples} held-out examples: {told} (95 % interval {mine.low:.0%} to {mine.high:.0%})"
    )


def forgetting_message(found: Forgetting) -> str:
    return (
        f"Forgetting: perplexity on general text is x {found.ratio:.2f} ({found.low:.2f} to {found.high:.2f}) of the"
        f" base's {found.base_perplexity:.1f}"
    )


def step_metrics_csv(trainer: Trainer) -> bytes:
    """OpenAI's result file, with reward margins for a run on pairs; cells of steps without an evaluation are empty."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    paired = trainer.config.beta is not None
    header = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    if paired:
        header = ["step", "train_loss", "train_accuracy", "train_reward_margin"]
        header += ["valid_loss", "valid_accuracy", "valid_reward_margin"]
    table.writerow(header)
    for result in trainer.history:
        score = trainer.scores.get(result.step)
        table.writerow([result.step, *_cells(result, paired), *_cells(score, paired)])
    return buffer.getvalue().encode()


def _cells(found: StepResult | Score | None, paired: bool) -> list[float | str | None]:
    if found is None:
        return ["", "", ""] if paired else ["", ""]
    return [found.loss, found.accuracy, found.margin] if paired else [found.loss, found.accuracy]
