"""How a run tells of itself: metrics, messages and the result file. Knows no queue and no tensors."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from math import isfinite
from typing import Any

from adapters.evaluation import EvaluationReport
from adapters.packed_loss import Score
from adapters.trainer import StepResult, Trainer


def step_metrics(trainer: Trainer, result: StepResult, score: Score | None, *, whole: bool) -> dict[str, Any]:
    """Data of a metrics event, in OpenAI's names; `whole` adds `full_valid_*`.

    An evaluation always covers all validation examples, so both pairs are the same numbers.
    """
    metrics = {
        "step": result.step,
        "total_steps": trainer.num_steps,
        "train_loss": _finite(result.loss),
        "train_mean_token_accuracy": result.accuracy,
        **score_metrics(score),
    }
    if whole and score is not None:
        metrics |= {"full_" + name: value for name, value in score_metrics(score).items()}
    return metrics


def score_metrics(score: Score | None) -> dict[str, float | None]:
    if score is None:
        return {}
    return {"valid_loss": _finite(score.loss), "valid_mean_token_accuracy": score.accuracy}


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


def evaluation_message(report: EvaluationReport) -> str:
    contestants = (
        ("base", report.base),
        (f"{report.num_shots}-shot prompt", report.few_shot),
        ("this model", report.adapter),
    )
    matches = ", ".join(f"{name} {contestant.exact_match:.0%}" for name, contestant in contestants)
    return f"Exact match on {report.num_examples} held-out examples: {matches}"


def step_metrics_csv(trainer: Trainer) -> bytes:
    """OpenAI's result file; cells of steps without an evaluation are empty."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
    for result in trainer.history:
        score = trainer.scores.get(result.step)
        measured = (score.loss, score.accuracy) if score else ("", "")
        table.writerow([result.step, result.loss, result.accuracy, *measured])
    return buffer.getvalue().encode()
