"""How log lines look: structlog's and the standard library's alike, for people or as JSON. Knows no event.

Events are named by an action and carry ids; prompts, answers and keys are never logged, nor the variables of a frame.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_STATE = "_request_state"
REQUEST_IDS = {"request_id": "request_id", "trace_id": "trace_id", "tenant_id": "tenant"}
"""What a request's state calls it -> what its log lines call it."""


@contextmanager
def log_ids(state: Mapping[str, Any]) -> Iterator[None]:
    """Lines logged inside carry the ids of a request's `state`, in its threads too; its tenant once it is known."""
    with structlog.contextvars.bound_contextvars(**{_STATE: state}):
        yield


def _name_request(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    state = event.pop(_STATE, None)
    if state is not None:
        for name, label in REQUEST_IDS.items():
            if state.get(name) is not None:
                event.setdefault(label, state[name])
    return event


ID_PROCESSORS: tuple[Processor, ...] = (structlog.contextvars.merge_contextvars, _name_request)
"""What gives a line the ids of its request."""


def configure_logging(level: str, log_format: Literal["text", "json"]) -> None:
    """Send everything of at least `level` to stderr. Called once, by the command that serves."""
    shared: list[Processor] = [
        *ID_PROCESSORS,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_rendering(log_format))
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # talkative at info; those of S3 clients show signed headers at debug
    for name in ("httpx", "httpcore", "uvicorn", "fsspec", "urllib3", "botocore", "aiobotocore", "boto3", "s3fs"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _rendering(log_format: Literal["text", "json"]) -> list[Processor]:
    cleanup: Processor = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if log_format == "json":
        return [cleanup, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    plain = structlog.dev.plain_traceback  # a prettier one would show the variables, prompts and keys among them
    return [cleanup, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
