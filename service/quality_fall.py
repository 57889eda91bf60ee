"""Whether answers are judged worse than those of a version's first weeks. Only arithmetic; knows no row.

Judged answers come in blocks. The first are the baseline; from the start of each later block, everything since then is
one stream, compared with the baseline by the e-process of `service.sequential_test`. A fall at any time shows in the
streams that start soon after it, so nothing that was good for a year hides it. Stream number j is tested at
`alpha / (j (j + 1))`, and these add up to `alpha`: while quality holds, the probability that it is ever called falling
is at most alpha, however often one looks and however long it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

from service.sequential_test import Stream, always_valid_p, anytime_interval, e_value, log_e_value

BLOCK_SIZE = 25
BASELINE_BLOCKS = 4
"""Of the first 100 judged answers."""

ALPHA = 0.01
"""For one version and one measure (accuracy, or ratings), over its whole life."""

MAX_STREAMS = 40
"""Of the latest starts; leaving out older ones cannot cause an alarm."""


@dataclass(frozen=True)
class Fall:
    """The strongest evidence, and whether it is enough."""

    baseline: Stream
    since: Stream
    log_e: float
    log_threshold: float

    @property
    def is_certain(self) -> bool:
        return self.log_e >= self.log_threshold

    @property
    def e_value(self) -> float:
        return e_value(self.log_e)

    @property
    def p_value(self) -> float:
        """Corrected for all streams that were or will be looked at."""
        return min(1.0, always_valid_p(self.log_e) * exp(self.log_threshold) * ALPHA)


def baseline_of(blocks: Sequence[Stream]) -> Stream | None:
    """None until it is whole."""
    first = blocks[:BASELINE_BLOCKS]
    return summed(first) if len(blocks) > BASELINE_BLOCKS or _is_whole(first) else None


def find_fall(blocks: Sequence[Stream], alpha: float = ALPHA) -> Fall | None:
    """Of blocks in their order, numbers from 0 (bad) to 1. None: there is nothing to compare yet."""
    baseline, later = baseline_of(blocks), blocks[BASELINE_BLOCKS:]
    if baseline is None or not later:
        return None
    since, found = Stream(0, 0.0), None
    for number in range(len(later), max(0, len(later) - MAX_STREAMS), -1):
        since = summed((since, later[number - 1]))
        fall = Fall(baseline, since, log_e_value(baseline, since), log(number * (number + 1) / alpha))
        if found is None or fall.log_e - fall.log_threshold > found.log_e - found.log_threshold:
            found = fall
    return found


def difference(baseline: Stream, now: Stream) -> tuple[float, float]:
    """Of the means, now minus then: covers it at all times at once with 95 %."""
    return anytime_interval(now, baseline, 0.05)


def summed(streams: Sequence[Stream]) -> Stream:
    return Stream(sum(stream.count for stream in streams), sum(stream.total for stream in streams))


def _is_whole(first: Sequence[Stream]) -> bool:
    return len(first) == BASELINE_BLOCKS and first[-1].count >= BLOCK_SIZE
