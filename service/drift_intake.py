"""From an answer on the event loop to the queue of the watch: bounded, fair between streams. Reads no database.

The text of an answer lives here until the worker has looked at it, in memory, and no longer.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from service.drift_prompt import probe_tokens
from service.engine.sequence import FinishReason, OutputChunk

log = structlog.get_logger("service.drift")

MAX_WAITING = 256
MAX_WAITING_OF_A_STREAM = 32
MAX_ANSWER_CHARACTERS = 16 * 1024
"""What is longer is not kept to its end, and nobody can say whether it is valid JSON."""

StreamKey = tuple[str, str]
"""Tenant and adapter digest."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Turn:
    """A conversation's first turn. `user` is the end user's name, where one was given."""

    user: str | None = None
    expects_json: bool = False


@dataclass(frozen=True)
class Answered:
    """A prompt and its answer. `prompt` is cut for a probe, `prompt_digest` names what is left: what is the same
    behind the cut would be measured the same. `prompt_length` is the whole one's."""

    tenant_id: str
    digest: str
    model: str
    turn: Turn
    prompt: tuple[int, ...]
    prompt_digest: bytes
    prompt_length: int
    text: str
    is_whole: bool
    length: int
    finish_reason: FinishReason
    nll: float | None = None
    entropy: float | None = None

    @property
    def key(self) -> StreamKey:
        return (self.tenant_id, self.digest)


class DriftTap:
    """Listens to the first answer of one request."""

    def __init__(
        self,
        tenant_id: str,
        digest: str,
        model: str,
        turn: Turn,
        prompt: tuple[int, ...],
        deliver: Callable[[Answered], None],
        on_failed: Callable[[], None],
    ) -> None:
        self._who = (tenant_id, digest, model)
        self._turn = turn
        self._prompt = prompt
        self._deliver = deliver
        self._on_failed = on_failed
        self._pieces: list[str] = []
        self._room = MAX_ANSWER_CHARACTERS
        self._last: OutputChunk | None = None

    def add(self, chunk: OutputChunk) -> None:
        if self._room >= 0:
            self._pieces.append(chunk.text)
            self._room -= len(chunk.text)
        if chunk.finish_reason is not None:
            self._last = chunk

    def finished(self) -> None:
        """The answer is whole. Raises nothing: a request does not fail because it is watched."""
        try:
            if self._last is not None and self._last.finish_reason is not None:
                self._deliver(self._seen(self._last, self._last.finish_reason))
        except Exception:
            log.exception("drift_tap_failed")
            self._on_failed()

    def _seen(self, last: OutputChunk, reason: FinishReason) -> Answered:
        prompt = probe_tokens(self._prompt)
        return Answered(
            *self._who,
            turn=self._turn,
            prompt=prompt,
            prompt_digest=_digest(prompt),
            prompt_length=len(self._prompt),
            text="".join(self._pieces)[:MAX_ANSWER_CHARACTERS],
            is_whole=self._room >= 0,
            length=last.num_output_tokens,
            finish_reason=reason,
            nll=last.answer_nll,
            entropy=last.answer_entropy,
        )


class FairQueue(Generic[Item]):
    """Streams take turns; each may have so much waiting, and all together."""

    def __init__(self, *, max_waiting: int = MAX_WAITING, max_of_a_stream: int = MAX_WAITING_OF_A_STREAM) -> None:
        self._max_waiting, self._max_of_a_stream = max_waiting, max_of_a_stream
        self._of: OrderedDict[StreamKey, deque[Item]] = OrderedDict()
        self._num = 0
        self.num_put = 0
        """Ever."""
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return self._num

    def put(self, key: StreamKey, item: Item) -> bool:
        """Never waits. False when there is no room: the item is not taken."""
        with self._changed:
            waiting = self._of.get(key)
            if self._num >= self._max_waiting or (waiting and len(waiting) >= self._max_of_a_stream):
                return False
            self._of.setdefault(key, deque()).append(item)
            self._num += 1
            self.num_put += 1
            self._changed.notify()
            return True

    def take(self, timeout_seconds: float = 0.0) -> Item | None:
        """The next stream's oldest; None when nothing came in time, or on `wake`."""
        with self._changed:
            if not self._num and timeout_seconds > 0:
                self._changed.wait(timeout_seconds)
            if not self._num:
                return None
            key, waiting = self._of.popitem(last=False)
            item = waiting.popleft()
            self._num -= 1
            if waiting:
                self._of[key] = waiting
            return item

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _digest(prompt: tuple[int, ...]) -> bytes:
    """In memory only: what is kept is this, hashed again with the stream's salt."""
    return hashlib.blake2b(array("q", prompt).tobytes(), digest_size=16).digest()
