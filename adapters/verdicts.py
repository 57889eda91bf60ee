"""What a run's losses say about how it was trained: too long, too short, or well. Knows no tensors and no job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from statistics import fmean

OVERFIT_RISE = 0.05
"""The validation loss ended this share above its best, while the training loss went on falling."""
UNDERFIT_FALL = 0.05
"""The validation loss still fell by this share over the last quarter of its evaluations, and ended at its best."""
LITTLE_LEARNED = 0.1
"""The training loss fell by less than this share from its first tenth to its last."""
NOISE = 0.05
"""Nats: smaller differences say nothing, whatever share of a small loss they are."""
MAX_SKIPPED = 0.05


class Fit(StrEnum):
    GOOD = "good"
    OVERFIT = "overfit"
    UNDERFIT = "underfit"
    UNSTABLE = "unstable"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class TrainingVerdict:
    """How the run fitted its data, why one may say so, and what to try next (None: nothing)."""

    fit: Fit
    reason: str
    advice: str | None = None


def judge_training(
    train_losses: Sequence[float], valid_losses: Mapping[int, float], *, num_skipped: int = 0
) -> TrainingVerdict:
    """`train_losses` of each step, `valid_losses` by step (counting from 1), both in nats per token.

    An overfit run does no harm to what is published: the checkpoint with the best validation loss is. It says that
    the rest of the run was wasted, and that more data would help.
    """
    steps = sorted(step for step, loss in valid_losses.items() if isfinite(loss))
    losses = [loss for loss in train_losses if isfinite(loss)]
    if num_skipped > max(1, MAX_SKIPPED * len(train_losses)):
        return TrainingVerdict(
            Fit.UNSTABLE, f"{num_skipped} of {len(train_losses)} steps were not finite.", "Try a lower learning rate."
        )
    if len(steps) < 3 or len(losses) < 3:
        return TrainingVerdict(Fit.UNKNOWN, f"{len(steps)} evaluations in {len(losses)} steps are too few to tell.")
    best = min(steps, key=lambda step: valid_losses[step])
    lowest, last = valid_losses[best], valid_losses[steps[-1]]
    if last - lowest > max(NOISE, OVERFIT_RISE * lowest) and _fell_after(train_losses, best):
        return TrainingVerdict(
            Fit.OVERFIT,
            f"The validation loss was best at step {best} ({lowest:.3f}) and rose to {last:.3f} by step {steps[-1]},"
            " while the training loss went on falling.",
            "The best checkpoint is the one that counts; fewer epochs, more or more varied examples, or dropout.",
        )
    tenth = max(1, len(losses) // 10)
    first_loss, last_loss = fmean(losses[:tenth]), fmean(losses[-tenth:])
    if first_loss - last_loss < max(NOISE, LITTLE_LEARNED * first_loss) and last_loss > 4 * NOISE:
        return TrainingVerdict(
            Fit.UNDERFIT,
            f"The training loss hardly fell: {first_loss:.3f} at the start, {last_loss:.3f} at the end.",
            "Try a higher learning rate, more epochs or a larger lora_r; and see whether the answers follow from the"
            " prompts at all.",
        )
    before = valid_losses[steps[-1 - max(1, len(steps) // 4)]]
    if best == steps[-1] and before - last > max(NOISE, UNDERFIT_FALL * before):
        return TrainingVerdict(
            Fit.UNDERFIT,
            "The validation loss was still falling when the run ended:"
            f" {before:.3f} to {last:.3f} over the last quarter.",
            "Train for more epochs.",
        )
    return TrainingVerdict(
        Fit.GOOD, f"The validation loss fell to {lowest:.3f} at step {best} and stayed there ({last:.3f} at the end)."
    )


def _fell_after(train_losses: Sequence[float], step: int) -> bool:
    """The second half of what followed `step` lies below what came just before it."""
    after = [loss for loss in train_losses[step:] if isfinite(loss)]
    before = [loss for loss in train_losses[max(0, step - max(1, len(after) // 2)) : step] if isfinite(loss)]
    return bool(after and before) and fmean(after[len(after) // 2 :]) < fmean(before)
