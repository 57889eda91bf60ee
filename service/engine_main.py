"""`python -m service.engine_main FD`: the engine's process, a child of the one that serves HTTP.

The first message on the socket FD is the Settings. Signals are the parent's business: it says Stop, or it is gone.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from adapters.errors import AdapterError
from service.archive import Archive
from service.config import Settings
from service.engine.engine_host import EngineHost
from service.engine.errors import EngineError
from service.engine.grammar_compiler import GrammarCompiler
from service.engine.line import Line
from service.engine.messages import NotStarted
from service.engine.sequence import SequenceReport
from service.engine_room import running_engine
from service.errors import ServiceError
from service.job import JobStatus
from service.log import configure_logging
from service.tracing.configuration import open_traces

logger = logging.getLogger(__name__)


class _Reporter:
    """The observer here: tells the metrics at the other end."""

    def __init__(self, host: EngineHost) -> None:
        self._report = host.report

    def sequence_finished(self, report: SequenceReport) -> None:
        self._report("sequence_finished", report)

    def adapter_loaded(self, tier: str, seconds: float) -> None:
        self._report("adapter_loaded", tier, seconds)

    def adapter_evicted(self, reason: str) -> None:
        self._report("adapter_evicted", reason)

    def adapter_verify_failed(self, reason: str) -> None:
        self._report("adapter_verify_failed", reason)

    def job_entered(self, state: JobStatus) -> None:
        self._report("job_entered", state)

    def write_fenced(self) -> None:
        self._report("write_fenced")

    def job_run_finished(self, outcome: str, seconds: float) -> None:
        self._report("job_run_finished", outcome, seconds)

    def tokens_trained(self, num_tokens: int) -> None:
        self._report("tokens_trained", num_tokens)

    def training_paced(self, ratio: float, p99_seconds: float | None, held_seconds: float) -> None:
        self._report("training_paced", ratio, p99_seconds, held_seconds)


def main(descriptor: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(descriptor)
    line = Line(connection)
    settings: Settings = line.receive()
    configure_logging(settings.log_level, settings.log_format)
    try:
        _run(settings, line)
    except (AdapterError, EngineError, ServiceError) as error:
        line.send(NotStarted(error.message))
    except Exception as error:
        logger.exception("engine_process.failed")
        line.send(NotStarted(f"the engine could not be started: {type(error).__name__}"))


def _run(settings: Settings, line: Line) -> None:
    host = EngineHost(line)
    reporter = _Reporter(host)
    traces = open_traces(settings, "engine")
    with (
        contextlib.nullcontext() if traces is None else contextlib.closing(traces),
        Archive.open(settings, reporter.adapter_verify_failed) as archive,
        running_engine(settings, archive, reporter, host.flush, traces) as engine,
    ):
        grammars = GrammarCompiler(engine.base)
        drain_seconds = host.serve(engine, grammars)
        engine.shutdown(drain_seconds)
        grammars.close()
    host.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
