"""Compiles grammars on threads of its own and keeps the latest. Knows no HTTP; who asks waits on the event loop."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol, cast

import llguidance.hf
from llguidance import LLTokenizer, TokenizerWrapper
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from service.engine.detokenizer import TokenBytes
from service.engine.errors import GrammarsUnavailableError, InvalidGrammarError, QueueFullError
from service.engine.grammar import Grammar
from service.engine.grammar_source import GrammarSource

logger = logging.getLogger(__name__)

MAX_CACHED = 256
MAX_CACHED_BYTES = 512 * 1024
MAX_PENDING = 64
TIME_LIMIT_SECONDS = 5.0
NUM_THREADS = 2


class HasTokenizer(Protocol):
    """The part of `BaseModel` that is needed here."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...


_Key = tuple[str, str, str]


class GrammarCompiler:
    """One compilation per tenant and distinct source, however many ask at once; the least recently used go first.

    A compilation cannot be killed, but llguidance's limits end it; the time limit is for whoever waits.
    """

    def __init__(self, base: HasTokenizer) -> None:
        self._tokenizer = _tokenizer(base)
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        self._cached: OrderedDict[_Key, Grammar] = OrderedDict()
        self._pending: dict[_Key, Future[Grammar]] = {}
        self.num_compiled = 0

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def of(self, tenant: str) -> TenantGrammars:
        return TenantGrammars(self, tenant)

    def forget(self, tenant: str) -> None:
        """A deleted tenant."""
        with self._lock:
            for key in [key for key in self._cached if key[0] == tenant]:
                del self._cached[key]

    async def compile(self, source: GrammarSource, time_limit_seconds: float = TIME_LIMIT_SECONDS) -> Grammar:
        """The compiled grammar.

        Raises:
            InvalidGrammarError: it is malformed, too complex, or took too long.
            GrammarsUnavailableError: this base's tokenizer cannot be used with grammars.
            QueueFullError: too many others are being compiled.
        """
        found = self.find_or_start(source)
        if isinstance(found, Grammar):
            return found
        waiting = asyncio.wrap_future(found)
        waiting.add_done_callback(_hear_out)
        done, _ = await asyncio.wait((waiting,), timeout=time_limit_seconds)  # cancels nothing: others wait too
        if done:
            return _result(waiting, source)
        if not found.running():
            raise QueueFullError("too many grammars are being compiled", retry_after=time_limit_seconds)
        reason = f"compiling it took longer than {time_limit_seconds:g} s; make it simpler"
        raise InvalidGrammarError(reason, param=source.param)

    def find_or_start(self, source: GrammarSource) -> Grammar | Future[Grammar]:
        """The compiled grammar, or what will be one. Raises as `compile`, but never for the time it takes."""
        if self._tokenizer is None:
            raise GrammarsUnavailableError(
                f"'{source.param}' cannot be kept to: this base's tokenizer cannot be used with grammars",
                param=source.param,
            )
        key = _key(source)
        with self._lock:
            if key in self._cached:
                self._cached.move_to_end(key)
                return self._cached[key]
            if key not in self._pending:
                if len(self._pending) >= MAX_PENDING:
                    raise QueueFullError("too many grammars are being compiled", retry_after=1.0)
                self._pending[key] = self._pool.submit(self._compile, source, self._tokenizer)
            return self._pending[key]

    def _compile(self, source: GrammarSource, tokenizer: LLTokenizer) -> Grammar:
        key = _key(source)
        try:
            grammar = Grammar.compile(source, tokenizer)
            with self._lock:
                self.num_compiled += 1
                self._cached[key] = grammar
                self._shrink()
            return grammar
        finally:
            with self._lock:
                del self._pending[key]

    def _shrink(self) -> None:
        while len(self._cached) > MAX_CACHED or sum(len(key[-1]) for key in self._cached) > MAX_CACHED_BYTES:
            self._cached.popitem(last=False)


class TenantGrammars:
    """The compiler as one tenant uses it."""

    def __init__(self, compiler: GrammarCompiler, tenant: str) -> None:
        self._compiler = compiler
        self._tenant = tenant

    async def compile(self, source: GrammarSource) -> Grammar:
        """Raises as `GrammarCompiler.compile`."""
        return await self._compiler.compile(replace(source, tenant=self._tenant))


def _key(source: GrammarSource) -> _Key:
    return (source.tenant, source.kind, source.text)


def _hear_out(waiting: asyncio.Future[Grammar]) -> None:
    """Nobody may be left to ask for the exception of a compilation that took too long."""
    if not waiting.cancelled():
        waiting.exception()


def _result(waiting: asyncio.Future[Grammar], source: GrammarSource) -> Grammar:
    try:
        return waiting.result()
    except InvalidGrammarError as error:
        raise error.of(source.param) from None


def _tokenizer(base: HasTokenizer) -> LLTokenizer | None:
    """llguidance's view of the vocabulary; None, and a line in the log, when there is none."""
    try:
        num_tokens = max(base.vocab_size, len(base.tokenizer))
        ends = sorted(base.eos_token_ids) or None
        try:
            fast = cast(PreTrainedTokenizerFast, base.tokenizer)
            return llguidance.hf.from_tokenizer(fast, n_vocab=num_tokens, eos_token=ends)
        except ValueError:  # a decoder it does not know: SentencePiece without byte fallback, say
            return LLTokenizer(TokenizerWrapper(_Vocabulary(base)), n_vocab=num_tokens, eos_token=ends)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust arrives as a BaseException of its own
        logger.warning("grammar.unavailable", extra={"reason": f"{type(error).__name__}: {error}"})
        return None


class _Vocabulary:
    """A tokenizer as `TokenizerWrapper` reads it: the bytes of each token, and text to tokens."""

    _PROBE = '{"a": [1]}'

    def __init__(self, base: HasTokenizer) -> None:
        token_bytes = TokenBytes(base.tokenizer)
        self._backend = _without_first_space(base.tokenizer.backend_tokenizer)
        self.eos_token_id = min(base.eos_token_ids)
        self.bos_token_id = base.tokenizer.bos_token_id
        self.tokens = [token_bytes.of(token) for token in range(len(base.tokenizer))]
        self.special_token_ids = sorted(base.tokenizer.all_special_ids)
        if b"".join(self.tokens[token] for token in self(self._PROBE)) != self._PROBE.encode():
            raise ValueError("its tokens do not spell the text they stand for")

    def __call__(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def _without_first_space(backend: Any) -> Any:
    """A copy that takes text as it is: SentencePiece-like tokenizers put a space before it."""
    state = json.loads(backend.to_str())
    pre_tokenizer = state.get("pre_tokenizer") or {}
    for part in (pre_tokenizer, *pre_tokenizer.get("pretokenizers", ())):
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
    return type(backend).from_str(json.dumps(state))
