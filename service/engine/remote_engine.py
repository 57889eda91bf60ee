"""An engine in a process of its own, behind the interface of one in this process. Knows messages, not what they cause.

HTTP and decoding then never wait for each other's interpreter. When the process dies, whoever waits for an answer
gets an error, requests are refused while it is started again, and too many deaths within ten minutes are the end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue

from service.engine.crash_limit import CrashLimit
from service.engine.engine_process import EngineProcess
from service.engine.errors import BaseModelError, EngineDeadError
from service.engine.intake import Abort, Forget, Retire
from service.engine.messages import Ask, Chunks, Happened, NotStarted, Pulse, Ready, Stop, ToEngine
from service.engine.observation import EngineStats
from service.engine.sequence import FinishReason, GenerationRequest, OutputChunk
from service.engine.serving_engine import ServingEngine

logger = logging.getLogger(__name__)

MAX_DEATHS, DEATH_WINDOW_SECONDS = 3, 600.0
SILENCE_SECONDS = 5.0
"""A process that sent no pulse for so long is stuck, however idle it said it was."""
END_SECONDS = 15.0
"""For training to save its state and for everything to stop, beyond what running answers may take; then: a kill."""


class RemoteEngine(ServingEngine):
    """Started by its constructor, which takes as long as the base takes to load."""

    def __init__(
        self, start: Callable[[], EngineProcess], observer: object, started: EngineProcess | None = None
    ) -> None:
        """`observer` hears what the engine's process tells: EngineObserver, and whatever else runs there. `started` is
        the first process, where there is one already.

        Raises:
            BaseModelError: the process could not start its engine.
        """
        super().__init__()
        self._start = start
        self._observer = observer
        self._lock = threading.Lock()
        self._open: dict[str, Callable[[OutputChunk], None]] = {}
        self._deaths = CrashLimit(MAX_DEATHS, DEATH_WINDOW_SECONDS)
        self._num_deaths = 0
        self._stopping = False
        self._refusal: str | None = None
        self._process = started or start()
        self._successor: EngineProcess | None = None
        """While it is loading the base."""
        ready = self._ready(self._process)
        self.base, self.embedding_size = ready.base, ready.embedding_size
        self._stats, self._heard_at = ready.stats, time.monotonic()
        self._ended_at: float | None = None
        self._outgoing: SimpleQueue[ToEngine | None] = SimpleQueue()
        self._listener = threading.Thread(target=self._listen, name="engine-listener", daemon=True)
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._listener.start()
        self._writer.start()

    # -- what other threads call ------------------------------------------------------------------------------

    @property
    def process_id(self) -> int | None:
        return self._process.pid

    def submit(self, request: GenerationRequest, on_chunk: Callable[[OutputChunk], None]) -> None:
        grammar = request.sampling.grammar
        if grammar is not None:
            request = replace(request, sampling=replace(request.sampling, grammar=None))
        with self._lock:  # between the process's death and its successor nobody may slip in
            if self._refusal is not None:
                raise EngineDeadError(self._refusal)
            self._open[request.request_id] = on_chunk
            self._outgoing.put(Ask(request, None if grammar is None else grammar.order()))

    def abort(self, request_id: str) -> None:
        if self._open.pop(request_id, None) is not None:
            self._ended_at = time.monotonic()
        self._outgoing.put(Abort(request_id))

    def retire(self, digest: str) -> None:
        self._outgoing.put(Retire(digest))

    def forget_tenant(self, tenant: str) -> None:
        self._outgoing.put(Forget(tenant))

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def last_ended_at(self) -> float | None:
        return self._ended_at

    def stats(self) -> EngineStats:
        stats, silent_since = self._stats, self._heard_at
        if stats.busy_since is None and stats.alive and time.monotonic() - silent_since > SILENCE_SECONDS:
            stats = replace(stats, busy_since=None if stats.restarting else silent_since)
        return replace(stats, num_restarts=stats.num_restarts + self._num_deaths)

    def shutdown(self, drain_seconds: float) -> None:
        with self._lock:
            self._stopping = True
            self._refusal = self._refusal or "the service is shutting down"
            self._outgoing.put(Stop(drain_seconds))
            if self._successor is not None:
                self._successor.kill()  # nobody waits for it
        self._listener.join(drain_seconds + END_SECONDS)
        if self._listener.is_alive():
            self._process.kill()
        self._listener.join()
        self._process.join(END_SECONDS)
        self._outgoing.put(None)
        self._writer.join()

    # -- the writer's thread: an event loop must not wait for a full pipe -----------------------------------

    def _write(self) -> None:
        while (message := self._outgoing.get()) is not None:
            try:
                self._process.line.send(message)
            except OSError:  # it has died: the listener tells those who wait
                logger.debug("engine_process.unreachable")

    # -- the listener's thread ----------------------------------------------------------------------------------

    def _listen(self) -> None:
        while True:
            try:
                self._hear(self._process.line.receive())
            except (EOFError, OSError):
                if self._stopping or not self._revive():
                    break
            except Exception:  # who counts must not stop who listens
                logger.exception("engine_process.message_failed")
        self._abandon(self._refusal or "the engine has stopped", alive=False)

    def _hear(self, message: object) -> None:
        match message:
            case Chunks(chunks=chunks):
                for request_id, chunk in chunks:
                    self._put(request_id, chunk)
                self._outbox.deliver()
            case Happened(method=method, arguments=arguments):
                getattr(self._observer, method)(*arguments)
            case Pulse(stats=stats):
                self._stats, self._heard_at = stats, time.monotonic()

    def _put(self, request_id: str, chunk: OutputChunk) -> None:
        ended = chunk.finish_reason is not None
        if ended:
            self._ended_at = time.monotonic()
        put = self._open.pop(request_id, None) if ended else self._open.get(request_id)
        if put is not None:
            put(chunk)

    def _revive(self) -> bool:
        """Start the process again; False when it has died too often or cannot start."""
        self._process.join(10.0)
        end = self._process.describe_end()
        logger.error("engine_process.died", extra={"pid": self._process.pid, "end": end})
        self._num_deaths += 1
        self._abandon("the engine's process died and is restarting", alive=True)
        if self._deaths.exceeded_by_another():
            self._refusal = f"the engine's process died too often: {end}"
            return False
        try:
            process = self._start()
            with self._lock:
                self._successor = process
                if self._stopping:
                    process.kill()
            ready = self._ready(process)
        except Exception as error:
            logger.exception("engine_process.not_restarted")
            self._refusal = f"the engine's process could not be started again: {type(error).__name__}"
            return False
        with self._lock:
            self._process, self._stats, self._heard_at = process, ready.stats, time.monotonic()
            self._successor = None
            if self._stopping:
                process.line.send(Stop(0.0))
            else:
                self._refusal = None
        logger.warning("engine_process.restarted", extra={"pid": process.pid, "num_deaths": self._num_deaths})
        return True

    def _abandon(self, error: str, *, alive: bool) -> None:
        """Nobody will answer those who wait; `alive`: others may come again later."""
        with self._lock:
            self._refusal = error
            opened, self._open = self._open, {}
        self._stats = replace(
            self._stats,
            num_running=0,
            num_waiting=0,
            busy_since=None,
            restarting=alive,
            alive=alive,
            error=None if alive else error,
        )
        ended = OutputChunk("", (), None, FinishReason.ERROR, 0, 0, error=error)
        for put in opened.values():
            put(ended)
        self._outbox.deliver()

    def _ready(self, process: EngineProcess) -> Ready:
        """Wait until the base is loaded. Training may have begun by then, and tells so."""
        while True:
            try:
                message: object = process.line.receive()
            except (EOFError, OSError):
                process.join(5.0)
                end = process.describe_end()
                raise BaseModelError(f"the engine's process ended while it was starting: {end}") from None
            match message:
                case Ready():
                    return message
                case NotStarted(message=why):
                    process.join(END_SECONDS)
                    raise BaseModelError(why)
            self._hear(message)
