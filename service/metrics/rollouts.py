"""Versions on their way into service: canaries, shadows, feedback, retraining. Knows no experiment and no alias."""

from __future__ import annotations

from service.metrics.series import Series


class RolloutMetrics(Series):
    """Called by `service.rollout` and what it opens."""

    def __init__(self) -> None:
        super().__init__()
        self._canary_requests = self._counter(
            "canary_requests", "Requests for an alias with a canary, by the side that answered.", "arm", "outcome"
        )
        self._canary_ends = self._counter("canary_ends", "Canaries that ended by themselves.", "outcome", "reason")
        self._shadow_requests = self._counter("shadow_requests", "Copies of requests for shadows.", "outcome")
        self._feedback = self._counter("feedback", "Feedback taken.", "rating")
        self._retraining_proposals = self._counter(
            "retraining_proposals", "What became of proposals to retrain.", "trigger", "outcome"
        )
        self._completion_records_dropped = self._counter(
            "completion_records_dropped", "Answers that feedback cannot refer to: the database was too slow."
        )

    def canary_answered(self, arm: str, outcome: str) -> None:
        """A request for an alias that has a canary; the arm is stable or canary."""
        self._canary_requests.labels(arm, outcome).inc()

    def canary_ended(self, outcome: str, reason: str) -> None:
        """By itself: rolled_back because of `error` or `down` (feedback), or promoted."""
        self._canary_ends.labels(outcome, reason).inc()

    def shadow_ended(self, outcome: str) -> None:
        self._shadow_requests.labels(outcome).inc()

    def retraining_moved(self, trigger: str, outcome: str) -> None:
        """A proposal was made, started, dismissed or failed, or lacks examples (insufficient)."""
        self._retraining_proposals.labels(trigger, outcome).inc()

    def _count_feedback(self, rating: float | None) -> None:
        kind = "none" if rating is None else "up" if rating > 0 else "down" if rating < 0 else "neutral"
        self._feedback.labels(kind).inc()

    def completion_record_dropped(self) -> None:
        self._completion_records_dropped.inc()
