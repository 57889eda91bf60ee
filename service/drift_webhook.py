"""Drift's events, posted to one URL of the operator's: signed, retried, never waited for. Knows no database.

A delivery is best effort: what waits is lost when the process ends, and the events themselves are kept as rows.
The signature is `t=<unix seconds>,v1=<HMAC-SHA256 of "<t>.<body>", hex>`; a receiver recomputes it over the bytes that
it got, compares in constant time, and refuses an old `t`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable
from queue import Empty, Full, Queue

import httpx
import structlog

from service.drift_events import DriftEvent

log = structlog.get_logger("service.drift_webhook")

SIGNATURE_HEADER = "x-rootstock-signature"
MAX_WAITING = 256
MAX_ATTEMPTS = 6
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 1.0, 60.0
TIMEOUT_SECONDS = 10.0
CHECK_SECONDS = 0.5


class DriftWebhook:
    """A listener of `DriftWatch`. `on_ended` hears delivered, failed or dropped of each event."""

    def __init__(
        self,
        url: str,
        secret: bytes,
        on_ended: Callable[[str], None],
        *,
        first_delay_seconds: float = FIRST_DELAY_SECONDS,
    ) -> None:
        self._url = url
        self._secret = secret
        self._on_ended = on_ended
        self._first_delay_seconds = first_delay_seconds
        self._waiting: Queue[DriftEvent] = Queue(MAX_WAITING)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="drift-webhook", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends after the attempt that is under way; what waits is lost."""
        self._stopping.set()
        self._thread.join(TIMEOUT_SECONDS + CHECK_SECONDS)

    def __call__(self, event: DriftEvent) -> None:
        try:
            self._waiting.put_nowait(event)
        except Full:
            self._on_ended("dropped")

    def _loop(self) -> None:
        with httpx.Client(timeout=TIMEOUT_SECONDS, follow_redirects=False) as client:
            while not self._stopping.is_set():
                try:
                    event = self._waiting.get(timeout=CHECK_SECONDS)
                except Empty:
                    continue
                try:
                    self._on_ended("delivered" if self._deliver(client, event) else "failed")
                except Exception:  # the next one may fare better
                    log.exception("drift_webhook_failed", event_id=event.id)

    def _deliver(self, client: httpx.Client, event: DriftEvent) -> bool:
        body = json.dumps({**event.body(), "tenant": event.tenant_id}, ensure_ascii=False).encode()
        delay = self._first_delay_seconds
        for attempt in range(1, MAX_ATTEMPTS + 1):
            problem = self._post(client, event, body)
            if problem is None:
                return True
            log.warning("drift_webhook_refused", event_id=event.id, attempt=attempt, reason=problem)
            if attempt == MAX_ATTEMPTS or self._stopping.wait(delay):
                break
            delay = min(2 * delay, MAX_DELAY_SECONDS)
        return False

    def _post(self, client: httpx.Client, event: DriftEvent, body: bytes) -> str | None:
        """What went wrong; None when it was taken. The URL may hold a token: it is never logged."""
        headers = {
            "content-type": "application/json",
            "x-rootstock-event": event.id,
            SIGNATURE_HEADER: signature(self._secret, int(time.time()), body),
        }
        try:
            response = client.post(self._url, content=body, headers=headers)
        except httpx.HTTPError as error:
            return type(error).__name__
        return None if response.is_success else f"status {response.status_code}"


def signature(secret: bytes, at: int, body: bytes) -> str:
    """What the header says: the time is signed, too, so that nobody can send an old event again."""
    return f"t={at},v1={hmac.new(secret, f'{at}.'.encode() + body, hashlib.sha256).hexdigest()}"
