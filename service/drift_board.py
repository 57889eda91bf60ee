"""What each tenant's adapters last showed, for whoever scrapes: the worst of each. Knows no metric's name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from service.drift_intake import StreamKey
from service.drift_states import SIGNALS, DriftState
from service.drift_view import StreamView

SHOWN_SECONDS = 86_400.0
"""An adapter that nobody has asked for so long is not shown: a version that was replaced alarms no more."""


@dataclass(frozen=True)
class Worst:
    """Of some tenants, all their adapters together. What is not known is not there."""

    ratios: dict[str, float]
    states: dict[str, DriftState]
    samples: int


class DriftBoard:
    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: unix seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._views: dict[StreamKey, StreamView] = {}

    def put(self, view: StreamView) -> None:
        with self._lock:
            self._views[view.tenant_id, view.digest] = view

    def forget(self, key: StreamKey) -> None:
        with self._lock:
            self._views.pop(key, None)

    def keep(self, tenant_id: str, digests: Collection[str]) -> None:
        """Forget the tenant's other adapters."""
        with self._lock:
            kept = {key: view for key, view in self._views.items() if key[0] != tenant_id or key[1] in digests}
            self._views = kept

    def worst(self, label: Callable[[str], str]) -> dict[str, Worst]:
        """By label; `label` says under which one a tenant is shown."""
        oldest = self._clock() - SHOWN_SECONDS
        with self._lock:
            self._views = {key: view for key, view in self._views.items() if (view.seen_at or 0.0) >= oldest}
            views = list(self._views.values())
        grouped: dict[str, list[StreamView]] = {}
        for view in views:
            grouped.setdefault(label(view.tenant_id), []).append(view)
        return {name: _worst(group) for name, group in grouped.items()}


def _worst(views: Iterable[StreamView]) -> Worst:
    ratios: dict[str, float] = {}
    states: dict[str, DriftState] = {}
    samples = 0
    for view in views:
        samples += view.samples
        for name in SIGNALS:
            signal = view.signals[name]
            if signal.ratio is not None:
                ratios[name] = max(signal.ratio, ratios.get(name, signal.ratio))
            states[name] = max(signal.state, states.get(name, signal.state), key=lambda state: state.severity)
    return Worst(ratios, states, samples)
