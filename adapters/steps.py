"""The steps of long work, told by name to whoever watches. Knows nobody who does."""

from __future__ import annotations

from collections.abc import Callable

Reached = Callable[[str], None]
"""Called at a step, with its name. What it raises is what the step would have raised: a full disk, say."""


def unwatched(step: str) -> None:
    """Nobody watches, as always in service."""
