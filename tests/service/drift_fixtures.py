"""Monitors whose alarms a test decides, an engine that measures at once, and a watch on both."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from adapters.adapter_files import AdapterSource
from adapters.drift.reading import Reading
from adapters.errors import AdapterNotFoundError, DriftReferenceError
from service.drift import DriftWatch
from service.drift_board import DriftBoard
from service.drift_calibration import Calibrated
from service.drift_events import DriftEvents
from service.drift_intake import Answered, StreamKey, Turn
from service.drift_monitors import Monitors
from service.drift_probe import Prober
from service.drift_rows import DriftRecords
from service.drift_states import OUTPUT_SIGNALS
from service.drift_streams import DriftStreams
from service.engine.errors import EngineError
from service.engine.observation import EngineStats
from service.engine.sequence import FinishReason, GenerationRequest, OutputChunk
from tests.service.control_fixtures import Control

BASIS = "basis-of-tiny"
DIGEST = "d" * 64
WINDOW = 4
"""Observations until a fake monitor knows anything."""


@dataclass(frozen=True)
class FakeReference:
    basis: str = BASIS
    run_length: float = 1000.0


class FakePromptMonitor:
    """The mean length of the last `WINDOW` prompts over 100."""

    signals = ("prompt_embedding", "prompt_length")

    def __init__(self, state: bytes | None) -> None:
        if state == b"torn":
            raise DriftReferenceError("the kept state is torn")
        self.lengths: list[float] = [] if state is None else json.loads(state)

    def observe(self, embedding: NDArray[np.float32], values: Mapping[str, float]) -> Sequence[Reading]:
        self.lengths.append(values["prompt_length"])
        return [_reading("prompt_length", self.lengths)]

    def state_dict(self) -> bytes:
        return json.dumps(self.lengths).encode()

    def reset(self, signal: str | None = None) -> None:
        self.lengths = []


class FakeAnswerMonitor:
    """The share of refusals among the last `WINDOW` answers over a half; calibrated once it is told."""

    signals = OUTPUT_SIGNALS

    def __init__(self, state: bytes | None, owner: FakeMonitors) -> None:
        self.owner = owner
        self.refusals, self.calibrated = ([], False) if state is None else json.loads(state)

    @property
    def needs_calibration(self) -> bool:
        return self.owner.calibrates and len(self.refusals) >= WINDOW and not self.calibrated

    def observe(self, values: Mapping[str, float | None]) -> Sequence[Reading]:
        if self.owner.failing:
            raise RuntimeError("a monitor that breaks")
        self.owner.seen.append(dict(values))
        self.refusals.append(100 * (values["refusal"] or 0.0) + 1e-3)
        return [_reading("refusal", self.refusals)]

    def state_dict(self) -> bytes:
        return json.dumps([self.refusals, self.calibrated]).encode()

    def reset(self, signal: str | None = None) -> None:
        self.refusals = []


def _reading(signal: str, values: list[float]) -> Reading:
    if len(values) < WINDOW:
        return Reading(signal, None, None, len(values), False)
    mean = sum(values[-WINDOW:]) / WINDOW
    return Reading(signal, mean, 50.0, len(values), mean > 50.0)


@dataclass
class FakeMonitors:
    """`references` by directory name; those of no other adapter."""

    references: dict[str, FakeReference] = field(default_factory=lambda: {DIGEST: FakeReference()})
    run_length: float = 2000.0
    calibrates: bool = False
    failing: bool = False
    seen: list[dict[str, float | None]] = field(default_factory=list)

    def reference(self, source: AdapterSource) -> FakeReference | None:
        assert isinstance(source, Path)
        return self.references.get(source.name)

    def of_prompts(self, reference: object, state: bytes | None) -> FakePromptMonitor:
        return FakePromptMonitor(state)

    def of_answers(self, key: StreamKey, state: bytes | None) -> FakeAnswerMonitor:
        return FakeAnswerMonitor(state, self)


@dataclass
class ProbedEngine:
    """Measures at once, unless told otherwise. `probes` are the requests it got."""

    num_running: int = 0
    num_waiting: int = 0
    num_open: int = 0
    last_ended_at: float | None = None
    last_step_at: float | None = None
    refusal: EngineError | None = None
    fails: bool = False
    silent: bool = False
    alive: bool = True
    probes: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    on_probe: Callable[[GenerationRequest], None] = lambda request: None

    def submit(self, request: GenerationRequest, on_chunk: Callable[[OutputChunk], None]) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.probes.append(request)
        self.on_probe(request)
        if self.silent:
            return
        vector = None if self.fails else np.full(4, 0.5, np.float32)
        reason = FinishReason.ERROR if self.fails else FinishReason.STOP
        num = len(request.prompt_token_ids)
        on_chunk(OutputChunk("", (), None, reason, num, 0, embedding=vector, prompt_nll=2.0))

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            kv_usage=0.0,
            slots={},
            resident={},
            waiting_adapters=(),
            num_pinned=0,
            num_steps=1,
            num_preemptions=0,
            last_step_at=self.last_step_at,
            busy_since=None,
            num_restarts=0,
            restarting=False,
            alive=self.alive,
            error=None,
        )


class FakeCalibrator:
    """Done when a test says so."""

    def __init__(self) -> None:
        self.started: list[StreamKey] = []
        self.done: Calibrated | None = None
        self.is_busy = False
        self.stopped = False

    def start(self, key: StreamKey, seed: int, state: bytes) -> None:
        assert not self.is_busy
        self.started.append(key)
        self.is_busy, self._state = True, state

    def finish(self, *, fails: bool = False) -> None:
        refusals, _ = json.loads(self._state)
        self.done = Calibrated(self.started[-1], None if fails else json.dumps([refusals, True]).encode())

    def take(self) -> Calibrated | None:
        done, self.done = self.done, None
        self.is_busy = self.is_busy and done is None
        return done

    def stop(self) -> None:
        self.stopped = True


class CountingObserver:
    """A DriftObserver that remembers."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.alarms: Counter[str] = Counter()
        self.expected = 0.0
        self.seconds = 0.0
        self.failures = 0

    def drift_probe_ended(self, outcome: str) -> None:
        self.ended[outcome] += 1

    def drift_probed(self, seconds: float, is_free: bool) -> None:
        self.seconds += seconds

    def drift_alarmed(self, signal: str) -> None:
        self.alarms[signal] += 1

    def drift_alarms_expected(self, number: float) -> None:
        self.expected += number

    def drift_failed(self) -> None:
        self.failures += 1


@dataclass
class Watched:
    """A watch over a real database; `close` it before the database."""

    watch: DriftWatch
    streams: DriftStreams
    engine: ProbedEngine
    observer: CountingObserver
    monitors: FakeMonitors
    calibrator: FakeCalibrator

    def answer(
        self,
        tenant_id: str,
        number: int,
        *,
        digest: str = DIGEST,
        length: int = 10,
        text: str = "Yes.",
        user: str | None = None,
        expects_json: bool = False,
    ) -> None:
        """A request with a prompt of its own is answered."""
        prompt = (number, *range(length - 1))
        self.watch.answered(
            Answered(
                tenant_id,
                digest,
                f"ft:{digest[:4]}",
                Turn(user, expects_json),
                prompt,
                repr(prompt).encode(),
                length,
                text,
                True,
                len(text),
                FinishReason.STOP,
            )
        )

    def settle(self) -> None:
        """Until everything that was given is looked at, and measured if it may be."""
        wait_until(lambda: self.watch.is_quiet)


def watched(
    control: Control,
    *,
    monitors: FakeMonitors | None = None,
    engine: ProbedEngine | None = None,
    basis: str = BASIS,
    directory: Callable[[str], Path] = Path,
    max_in_memory: int = 64,
    start: bool = True,
) -> Watched:
    monitors, engine = monitors or FakeMonitors(), engine or ProbedEngine()
    board, observer = DriftBoard(time.time), CountingObserver()
    chosen, calibrator = cast(Monitors, monitors), FakeCalibrator()
    streams = DriftStreams(control.database, directory, basis, chosen, board, max_in_memory=max_in_memory)
    prober = Prober(engine, chunk_tokens=128, is_stopping=lambda: watch.is_stopping, clock=time.monotonic)
    records, events = DriftRecords(control.database, basis), DriftEvents(control.database)
    watch = DriftWatch(streams, prober, board, records, events, calibrator, observer, flush_seconds=0.05)
    if start:
        watch.start()
    return Watched(watch, streams, engine, observer, monitors, calibrator)


def nowhere(digest: str) -> Path:
    raise AdapterNotFoundError(f"no {digest}")


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)
