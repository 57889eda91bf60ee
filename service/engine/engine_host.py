"""The engine's end of the line: takes messages to an engine in this process and sends back what comes of them.

Knows the engine's interface and the messages; nothing of who is at the other end.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from service.engine.errors import EngineError
from service.engine.grammar import Grammar
from service.engine.grammar_compiler import GrammarCompiler
from service.engine.grammar_source import GrammarOrder
from service.engine.intake import Abort, Forget, Retire
from service.engine.line import Line
from service.engine.messages import Ask, Chunks, Happened, Pulse, Ready, Stop
from service.engine.observation import EngineStats
from service.engine.sequence import GenerationRequest, OutputChunk
from service.engine.serving_engine import ServingEngine
from service.engine.triggered_grammar import carried_out

logger = logging.getLogger(__name__)

PULSE_SECONDS, MAX_SILENCE_SECONDS = 0.2, 1.0
ORPHANED = 3
"""Exit status of an engine whose service is gone."""


class EngineHost:
    """`serve` returns when the engine shall stop; what is left of a step's chunks goes out by `flush`."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._chunks: list[tuple[str, OutputChunk]] = []
        self._compiling: dict[str, GenerationRequest] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def flush(self) -> None:
        """Send the chunks of a step; called in the engine's thread, as whoever adds to them is."""
        if self._chunks:
            chunks, self._chunks = self._chunks, []
            self._send(Chunks(chunks))

    def serve(self, engine: ServingEngine, grammars: GrammarCompiler) -> float:
        """Until Stop; returns how long running answers may take to finish. Ends the process when nobody is there.

        What is said afterwards is still heard, in a thread: who has gone, and that there is less time.
        """
        self._line.send(Ready(engine.base.description(), engine.embedding_size, engine.stats()))
        pulse = threading.Thread(target=self._beat, args=(engine.stats,), name="engine-pulse", daemon=True)
        pulse.start()
        while not isinstance(message := self._receive(), Stop):
            self._obey(engine, grammars, message)
        threading.Thread(target=self._listen_on, args=(engine, grammars), name="engine-host", daemon=True).start()
        return message.drain_seconds

    def close(self) -> None:
        """The engine has stopped: no more pulses."""
        self._ended.set()

    def report(self, method: str, *arguments: Any) -> None:
        """Tell the observer at the other end."""
        self._send(Happened(method, arguments))

    def _receive(self) -> object:
        try:
            return self._line.receive()
        except (EOFError, OSError):
            if not self._ended.is_set():
                logger.warning("engine_process.orphaned")
                os._exit(ORPHANED)  # nothing here is worth saving: jobs go on from their resume points
            return None

    def _listen_on(self, engine: ServingEngine, grammars: GrammarCompiler) -> None:
        while not self._ended.is_set():
            message = self._receive()
            if isinstance(message, Stop):
                engine.shutdown(message.drain_seconds)
            else:
                self._obey(engine, grammars, message)

    def _obey(self, engine: ServingEngine, grammars: GrammarCompiler, message: object) -> None:
        match message:
            case Ask(request=request, grammar=order):
                if order is None:
                    self._submit(engine, request)
                else:
                    self._compile(engine, grammars, request, order)
            case Abort(request_id=request_id):
                with self._lock:
                    self._compiling.pop(request_id, None)
                engine.abort(request_id)
            case Retire(digest=digest):
                engine.retire(digest)
            case Forget(tenant=tenant):  # what is being compiled for it is refused by the engine
                engine.forget_tenant(tenant)
                grammars.forget(tenant)

    def _compile(
        self, engine: ServingEngine, grammars: GrammarCompiler, request: GenerationRequest, order: GrammarOrder
    ) -> None:
        """Submit the request once its grammar is there; nobody else waits for that."""
        with self._lock:
            self._compiling[request.request_id] = request
        try:
            found = grammars.find_or_start(order.source)
        except EngineError as error:
            self._refuse(request, error)
            return
        if isinstance(found, Grammar):
            self._compiled(engine, request, order, found)
        else:
            found.add_done_callback(lambda future: self._compiled(engine, request, order, future))

    def _compiled(
        self, engine: ServingEngine, request: GenerationRequest, order: GrammarOrder, done: Grammar | Future[Grammar]
    ) -> None:
        with self._lock:
            if self._compiling.pop(request.request_id, None) is None:
                return  # aborted meanwhile
        try:
            grammar = carried_out(order, done if isinstance(done, Grammar) else done.result())
        except EngineError as error:
            self._refuse(request, error)
        else:
            self._submit(engine, replace(request, sampling=replace(request.sampling, grammar=grammar)))

    def _submit(self, engine: ServingEngine, request: GenerationRequest) -> None:
        request_id = request.request_id
        try:
            engine.submit(request, lambda chunk: self._chunks.append((request_id, chunk)))
        except EngineError as error:
            self._refuse(request, error)

    def _refuse(self, request: GenerationRequest, error: EngineError) -> None:
        self._send(Chunks([(request.request_id, OutputChunk.of_refusal(error))]))

    def _beat(self, stats: Callable[[], EngineStats]) -> None:
        """While the interpreter runs at all, whatever the engine's thread does."""
        last, silence = None, 0.0
        while not self._ended.wait(PULSE_SECONDS):
            now, silence = stats(), silence + PULSE_SECONDS
            if now != last or silence >= MAX_SILENCE_SECONDS:
                self._send(Pulse(now))
                last, silence = now, 0.0

    def _send(self, message: object) -> None:
        try:
            self._line.send(message)
        except OSError:  # the service is gone; `serve` notices
            logger.debug("engine_process.unheard")
