"""What the API's process and the engine's tell each other. Both run the same code, so a message is a pickled value.

To the engine: Ask, Abort, Retire, Forget (as within the engine's own process) and Stop. From it: Ready or NotStarted
first, then Chunks, Happened and Pulse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from service.engine.base_description import BaseDescription
from service.engine.grammar_source import GrammarOrder
from service.engine.intake import Abort, Forget, Retire
from service.engine.observation import EngineStats
from service.engine.sequence import GenerationRequest, OutputChunk


@dataclass(frozen=True)
class Ask:
    """A request. A compiled grammar cannot travel: `grammar` says how it is made again."""

    request: GenerationRequest
    grammar: GrammarOrder | None


@dataclass(frozen=True)
class Stop:
    """End, after running answers had `drain_seconds` to finish."""

    drain_seconds: float


@dataclass(frozen=True)
class Ready:
    """The base is loaded and the engine runs."""

    base: BaseDescription
    embedding_size: int | None
    stats: EngineStats


@dataclass(frozen=True)
class NotStarted:
    """It could not be started; the message is for the operator."""

    message: str


@dataclass(frozen=True)
class Chunks:
    """What one step brought: request ids and their chunks."""

    chunks: list[tuple[str, OutputChunk]]


@dataclass(frozen=True)
class Happened:
    """Something for who counts: a method of the observer and its arguments."""

    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Pulse:
    """The picture of the engine, several times a second while it changes; once a second when it does not."""

    stats: EngineStats


ToEngine = Ask | Abort | Retire | Forget | Stop
FromEngine = Ready | NotStarted | Chunks | Happened | Pulse
