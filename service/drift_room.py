"""What watching for drift takes, wired once: streams, prober, webhook, metrics. Decides nothing itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from adapters.drift.reference import FACTS, TENSORS
from adapters.store import AdapterStore
from service.config import Settings
from service.database import Database
from service.drift import DriftWatch
from service.drift_board import DriftBoard
from service.drift_calibration import CalibrationProcess
from service.drift_events import DriftEvents, Listener
from service.drift_monitors import CalibratedMonitors, Monitors
from service.drift_probe import Prober
from service.drift_prompt import drift_basis
from service.drift_rows import DriftRecords
from service.drift_streams import DriftStreams
from service.engine.serving_engine import ServingEngine
from service.metrics import Metrics


@contextmanager
def open_drift(
    database: Database,
    store: AdapterStore,
    engine: ServingEngine,
    metrics: Metrics,
    settings: Settings,
    monitors: Monitors | None = None,
    listeners: Sequence[Listener] = (),
) -> Iterator[DriftWatch | None]:
    """Running until the block ends; then everything is written. None where the operator has turned it off."""
    if not settings.drift:
        yield None
        return
    with ExitStack() as stack:
        basis, board = drift_basis(engine.base), DriftBoard(time.time)
        chosen = monitors or CalibratedMonitors(settings.drift_run_length)
        streams = DriftStreams(database, lambda digest: store.read(digest, (FACTS, TENSORS)), basis, chosen, board)
        calibrator = CalibrationProcess(settings.drift_run_length)
        records = DriftRecords(database, basis)
        watch: DriftWatch
        prober = None
        if engine.embedding_size is not None:
            prober = Prober(
                engine,
                chunk_tokens=settings.prefill_chunk,
                is_stopping=lambda: watch.is_stopping,
                clock=time.monotonic,
            )
        watch = DriftWatch(streams, prober, board, records, DriftEvents(database), calibrator, metrics.drift)
        if settings.drift_webhook_url is not None and settings.drift_webhook_secret is not None:
            from service.drift_webhook import DriftWebhook  # an HTTP client, where one is wanted

            url, secret = (
                setting.get_secret_value() for setting in (settings.drift_webhook_url, settings.drift_webhook_secret)
            )
            webhook = DriftWebhook(url, secret.encode(), metrics.drift.drift_webhook_ended)
            webhook.start()
            stack.callback(webhook.stop)
            watch.add_listener(webhook)
        for listener in listeners:
            watch.add_listener(listener)
        metrics.drift.watch(board.worst)
        watch.start()
        stack.callback(watch.stop)
        yield watch
