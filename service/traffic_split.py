"""Who is on which side of a split of traffic: a stable hash. Knows no database and no HTTP.

SHA-256 of the experiment's id and of who asks gives a place in [0, 1); a share of x percent is everybody below x / 100.
So the same end user always lands on the same side, a larger share only adds users, and two experiments split alike
only by chance.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

_PLACES = 2.0**64


@dataclass(frozen=True)
class Place:
    """Where somebody stands in one experiment. `unit` names them there and says nothing of them elsewhere."""

    position: float
    unit: str

    def within(self, percent: float) -> bool:
        return self.position * 100.0 < percent


def place_of(experiment_id: str, who: str) -> Place:
    """`who` is any text that stays the same for one end user."""
    digest = hashlib.sha256(f"{experiment_id}\0{who}".encode()).digest()
    return Place(int.from_bytes(digest[:8], "big") / _PLACES, digest[8:24].hex())
