"""The watch for drift: takes answered requests in, measures their prompts, keeps the states, tells who listens.

One thread of its own does everything but `tap` and `answered`, which only look and append; calibrations are a child
process. Nothing here makes a request wait or fail: what does not fit is dropped and counted, what breaks is logged and
counted. Knows no HTTP.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import sqlalchemy as sa
import structlog

from service.drift_board import SHOWN_SECONDS, DriftBoard
from service.drift_calibration import Calibrated
from service.drift_events import DriftEvents, Listener
from service.drift_intake import Answered, DriftTap, FairQueue, StreamKey, Turn
from service.drift_monitors import seed_of
from service.drift_probe import Probed, Prober
from service.drift_rows import DriftRecords
from service.drift_states import DriftState, SignalState
from service.drift_stream import Change, DriftStream
from service.drift_streams import DriftStreams
from service.drift_view import Acknowledgement
from service.routing import ResolvedModel

log = structlog.get_logger("service.drift")

FLUSH_SECONDS = 5.0
POLL_SECONDS = 0.1
"""How often it is asked whether a waiting probe may start."""

MAX_PROBES_WAITING, MAX_PROBES_OF_A_STREAM = 1024, 64
"""Enough to fill the longest window: a busy minute is looked at in the next idle one."""


class DriftObserver(Protocol):
    """Who counts: `service.metrics.drift`."""

    def drift_probe_ended(self, outcome: str) -> None: ...
    def drift_probed(self, seconds: float, is_free: bool) -> None: ...
    def drift_alarmed(self, signal: str) -> None: ...
    def drift_alarms_expected(self, number: float) -> None: ...
    def drift_failed(self) -> None: ...


class Calibrating(Protocol):
    """One calibration at a time, elsewhere: `service.drift_calibration`."""

    @property
    def is_busy(self) -> bool: ...
    def start(self, key: StreamKey, seed: int, state: bytes) -> None: ...
    def take(self) -> Calibrated | None: ...
    def stop(self) -> None: ...


class DriftWatch:
    """`start` and `stop` it. Listeners are called by its thread, one event after the other, once they are written."""

    def __init__(
        self,
        streams: DriftStreams,
        prober: Prober | None,
        board: DriftBoard,
        records: DriftRecords,
        events: DriftEvents,
        calibrator: Calibrating,
        observer: DriftObserver,
        *,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        """Without a `prober` (a base that shows no hidden states) only answers are watched."""
        self.board = board
        self.records = records
        self.events = events
        self._streams = streams
        self._prober = prober
        self._calibrator = calibrator
        self._observer = observer
        self._flush_seconds = flush_seconds
        self._flushed_at = time.monotonic()
        self._listeners: list[Listener] = []
        self._answers: FairQueue[Answered] = FairQueue()
        self._probes: FairQueue[Answered] = FairQueue(
            max_waiting=MAX_PROBES_WAITING, max_of_a_stream=MAX_PROBES_OF_A_STREAM
        )
        self._uncalibrated: OrderedDict[StreamKey, None] = OrderedDict()
        self._num_looked_at = self._num_probed = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="drift", daemon=True)

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    @property
    def is_quiet(self) -> bool:
        """Whether everything that came in has been looked at, and everything to be measured has been."""
        return self._num_looked_at == self._answers.num_put and self._num_probed == self._probes.num_put

    def add_listener(self, listener: Listener) -> None:
        """Called with each change of state and each acknowledgement. What it raises is logged."""
        self._listeners.append(listener)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what is known; what waits to be measured is lost."""
        self._stopping.set()
        self._answers.wake()
        if self._thread.is_alive():
            self._thread.join()
        self._calibrator.stop()
        self._guarded(self._flush)
        self._guarded(self._tell)

    # -- for the event loop: never waits, never raises -----------------------------------------------------------

    def tap(self, tenant_id: str, model: ResolvedModel, turn: Turn | None, prompt: tuple[int, ...]) -> DriftTap | None:
        """What listens to the answer; None where there is nothing to watch: the base alone, or a later turn."""
        if turn is None or model.digest is None:
            return None
        return DriftTap(tenant_id, model.digest, model.id, turn, prompt, self.answered, self._observer.drift_failed)

    def answered(self, answered: Answered) -> None:
        if not self._answers.put(answered.key, answered):
            self._observer.drift_probe_ended("dropped")

    # -- for other threads ------------------------------------------------------------------------------------------

    def acknowledge(
        self, tenant_id: str, digest: str, model: str, *, signal: str | None, by: str, note: str | None
    ) -> None:
        """The signals that are in drift begin again. Raises ConflictError when none is."""
        self._streams.acknowledge((tenant_id, digest), model, signal, lambda now: Acknowledgement(now, by, note))
        self._answers.wake()

    def forget_deleted(self, tenant_id: str) -> None:
        """The tenant, or an adapter of its, was deleted, and the rows of its drift with it."""
        self._streams.drop_deleted(tenant_id)

    # -- the worker's thread ------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        self._guarded(self._show_kept)
        while not self._stopping.is_set():
            self._guarded(self._turn)
            self._guarded(self._calibrate)
            self._guarded(self._tell)
            if time.monotonic() - self._flushed_at >= self._flush_seconds:
                self._flushed_at = time.monotonic()
                self._guarded(self._flush)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except sa.exc.OperationalError as error:  # locked or not there: it may come back
            log.warning("drift_waits", reason=type(error.orig).__name__)
            self._observer.drift_failed()
        except Exception:  # the next one may fare better
            log.exception("drift_failed")
            self._observer.drift_failed()

    def _turn(self) -> None:
        """One answer, or one probe."""
        patience = POLL_SECONDS if len(self._probes) or self._calibrator.is_busy else self._flush_seconds
        answered = self._answers.take(0.0 if self._may_probe() else patience)
        if answered is not None:
            try:
                self._look_at(answered)
            finally:
                self._num_looked_at += 1
        elif self._may_probe() and (prompt := self._probes.take()) is not None:
            try:
                self._probe(prompt)
            finally:
                self._num_probed += 1

    def _may_probe(self) -> bool:
        return len(self._probes) > 0 and self._prober is not None and self._prober.may_start

    def _look_at(self, answered: Answered) -> None:
        """Whether it counts; then the answer is taken in at once, and the prompt waits for its probe."""
        now = time.time()
        with self._streams.lock:
            stream = self._streams.get(answered.key, answered.model)
            if stream is None:
                return
            skipped = stream.skips(answered, now)
            if skipped is not None:
                self._observer.drift_probe_ended(skipped.value)
                self.board.put(stream.view)
                return
            self._expect(stream, of_prompts=False)
            self._take(stream, stream.answered(answered, now))
            wants_probe = stream.prompts is not None and self._prober is not None
        if wants_probe and not self._probes.put(answered.key, replace(answered, text="")):
            self._observer.drift_probe_ended("dropped")
        if stream.needs_calibration:
            self._uncalibrated[answered.key] = None

    def _probe(self, answered: Answered) -> None:
        assert self._prober is not None
        probed = self._prober.measure(answered.tenant_id, answered.prompt)
        self._observer.drift_probe_ended("failed" if probed is None else "measured")
        if probed is None:
            return
        self._observer.drift_probed(probed.seconds, probed.is_free)
        self._compare(answered, probed)

    def _compare(self, answered: Answered, probed: Probed) -> None:
        with self._streams.lock:
            stream = self._streams.get(answered.key, answered.model)
            if stream is not None:
                self._expect(stream, of_prompts=True)
                length = answered.prompt_length
                self._take(stream, stream.prompted(probed.embedding, probed.nll, length, time.time()))

    def _take(self, stream: DriftStream, changes: list[Change]) -> None:
        for _, after in changes:
            if after.state is DriftState.DRIFT:
                self._observer.drift_alarmed(after.signal)
                _log_alarm(stream, after)
        self.board.put(stream.view)
        if stream.unsaved:
            self._guarded(lambda: self._streams.save([stream]))

    def _expect(self, stream: DriftStream, *, of_prompts: bool) -> None:
        if expected := stream.expected_alarms(of_prompts=of_prompts):
            self._observer.drift_alarms_expected(expected)

    def _calibrate(self) -> None:
        """Take what is done; let the next one begin."""
        if (done := self._calibrator.take()) is not None:
            with self._streams.lock:
                self._streams.calibrated(done)
            if done.state is None:
                self._observer.drift_failed()
        while self._uncalibrated and not self._calibrator.is_busy:
            key, _ = self._uncalibrated.popitem(last=False)
            with self._streams.lock:
                stream = self._streams.loaded(key)
                if stream is None or not stream.needs_calibration:
                    continue
                state = stream.answers.state_dict()
            self._calibrator.start(key, seed_of(key), state)

    def _flush(self) -> None:
        self._streams.save_dirty()

    def _tell(self) -> None:
        told = self._streams.told
        while told:
            event = told.popleft()
            for listener in self._listeners:
                try:
                    listener(event)
                except Exception:  # one listener must not cost another its event
                    log.exception("drift_listener_failed", event_id=event.id)
                    self._observer.drift_failed()

    def _show_kept(self) -> None:
        """What was known before the process started."""
        for view in self.records.seen_since(time.time() - SHOWN_SECONDS):
            self.board.put(view)


def _log_alarm(stream: DriftStream, signal: SignalState) -> None:
    view = stream.view
    log.warning(
        "drift",
        tenant=view.tenant_id,
        model=view.model,
        digest=view.digest,
        signal=signal.signal,
        statistic=signal.statistic,
        threshold=signal.threshold,
        samples=signal.samples,
    )
