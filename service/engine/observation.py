"""What the engine lets others see: a picture between two steps, and an ear for what happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from adapters.slot_observer import SlotObserver
from service.engine.sequence import SequenceReport


class EngineObserver(SlotObserver, Protocol):
    """Hears what happened. Called from the engine's threads: be quick."""

    def sequence_finished(self, report: SequenceReport) -> None: ...


@dataclass(frozen=True)
class EngineStats:
    """A consistent picture of the engine between two steps. Times are `time.monotonic()`.

    `resident` lists what is *loaded* by tier ("device", "host"), not what is running; `slots` the room there, and
    `num_pinned` how many of those on the device a running sequence uses.
    `busy_since` is when the engine last went from having nothing to compute to working; None while it has nothing.
    `restarting` lasts from a crash until a forward has succeeded again.
    """

    num_running: int
    num_waiting: int
    kv_usage: float
    slots: Mapping[str, int]
    resident: Mapping[str, tuple[str, ...]]
    waiting_adapters: tuple[str, ...]
    num_pinned: int
    num_steps: int
    num_preemptions: int
    last_step_at: float | None
    busy_since: float | None
    num_restarts: int
    restarting: bool
    alive: bool
    error: str | None
