"""`rootstock serve` that watches for drift all answers but those whose `user` is `UNWATCHED`. Knows no measurement.

Two services, one watched and one not, differ by some percent for no reason; here both kinds of answer come from the
same processes.
"""

from __future__ import annotations

from service.cli import main
from service.drift import DriftWatch
from service.drift_intake import DriftTap, Turn
from service.routing import ResolvedModel

UNWATCHED = "unwatched"


def _leave_out_the_unwatched() -> None:
    whole = DriftWatch.tap

    def tap(
        watch: DriftWatch, tenant_id: str, model: ResolvedModel, turn: Turn | None, prompt: tuple[int, ...]
    ) -> DriftTap | None:
        return None if turn is not None and turn.user == UNWATCHED else whole(watch, tenant_id, model, turn, prompt)

    DriftWatch.tap = tap  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    _leave_out_the_unwatched()
    main()
