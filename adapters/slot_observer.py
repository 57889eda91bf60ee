"""Who hears of adapters on their way between the tiers. Knows no tensor."""

from __future__ import annotations

from typing import Protocol


class SlotObserver(Protocol):
    """Who wants to know what the tiers do. Called from a loading thread or the engine's."""

    def adapter_loaded(self, tier: str, seconds: float) -> None: ...
    def adapter_evicted(self, reason: str) -> None: ...
    def adapter_verify_failed(self, reason: str) -> None: ...
