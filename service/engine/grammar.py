"""A compiled grammar, and a matcher that follows one answer through it token by token.

Knows llguidance and the vocabulary's size; nothing of logits, of threads or of who asked. A matcher belongs to one
sequence and sees each sampled token once: a preempted sequence keeps it, since replaying samples nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from service.engine.errors import InvalidGrammarError
from service.engine.grammar_source import JSON_OPTIONS, GrammarKind, GrammarOrder, GrammarSource

LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Work and memory of one compilation and of one step, in llguidance's units: about 10 ms each, at worst."""

Bits = NDArray[np.int32]
"""One bit per token, least significant first, padded to 32."""


class AnyMatcher(Protocol):
    """What the sampler and the engine need of a sequence's place in its grammar."""

    error: str | None

    @property
    def is_free(self) -> bool:
        """Whether every token is allowed now, so that there is nothing to mask."""
        ...

    @property
    def is_complete(self) -> bool: ...
    def allowed(self, bits: Bits) -> None: ...
    def consume(self, token_id: int) -> bool: ...


class AnyGrammar(Protocol):
    """What a request brings along."""

    @property
    def num_words(self) -> int: ...
    def start(self, ignore_eos: bool = False) -> AnyMatcher: ...
    def order(self) -> GrammarOrder: ...


class Grammar:
    """Immutable. `start` gives each sequence a matcher of its own."""

    def __init__(self, source: GrammarSource, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._source = source
        self._matcher = matcher  # never advanced, only copied
        self._tokenizer = tokenizer
        self.num_words = (tokenizer.vocab_size + 31) // 32
        self._ends = np.zeros(self.num_words, dtype=np.uint32)
        for token in tokenizer.eos_tokens:
            self._ends[token // 32] |= np.uint32(1 << token % 32)

    @classmethod
    def compile(cls, source: GrammarSource, tokenizer: LLTokenizer) -> Grammar:
        """Milliseconds to a second. Raises InvalidGrammarError; also for one whose first step is beyond the limits."""
        matcher = _guarded(lambda: LLMatcher(tokenizer, _text(source), log_level=0, limits=LIMITS), source)
        grammar = cls(source, matcher, tokenizer)
        trial = grammar.start()
        trial.allowed(np.empty(grammar.num_words, dtype=np.int32))
        problem = matcher.get_error() or "; ".join(matcher.get_grammar_warnings()) or trial.error
        if problem:
            raise _invalid(problem, source)
        return grammar

    def start(self, ignore_eos: bool = False) -> Matcher:
        return Matcher(self._matcher.deep_copy(), self._tokenizer, self._ends.view(np.int32), ignore_eos)

    def order(self) -> GrammarOrder:
        return GrammarOrder(self._source)

    def bytes_of(self, token_id: int) -> bytes:
        return bytes(self._tokenizer.decode_bytes([token_id]))

    def accepts(self, text: str) -> bool:
        """Whether `text` is a whole sentence of the grammar."""
        matcher = self._matcher.deep_copy()
        tokens = self._tokenizer.tokenize_str(text)
        return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


class Matcher:
    """Where one sequence stands in its grammar. Never raises: after a failure `error` says what it was."""

    is_free = False

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer, ends: Bits, ignore_eos: bool) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._ends = ends
        self._ignore_eos = ignore_eos
        self.error: str | None = None

    @property
    def is_complete(self) -> bool:
        """Nothing can follow; the answer is a sentence of the grammar."""
        return self.error is None and bool(self._matcher.is_stopped())

    def allowed(self, bits: Bits) -> None:
        """Write which tokens may come next into `bits`: [num_words]. All of them, after a failure.

        With `ignore_eos` the end tokens are allowed only where nothing else is.
        """
        self._try(lambda: self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes))
        if self.error is not None:
            bits.fill(-1)
        elif self._ignore_eos:
            others = bits & ~self._ends
            if others.any():
                bits[:] = others

    def consume(self, token_id: int) -> bool:
        """Take the sampled token in; False when the grammar has failed."""
        self._try(lambda: self._matcher.consume_token(token_id))
        return self.error is None

    def consume_text(self, written: bytes) -> bool:
        """Take in the rest of a token that began before the grammar did; False when it does not fit."""
        tokens = self._tokenizer.tokenize_bytes(written)
        self._try(lambda: self._matcher.consume_tokens(tokens))
        return self.error is None

    def _try(self, step: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            step()
            if self._matcher.is_error():
                self.error = _first_line(self._matcher.get_error())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust arrives as a BaseException of its own
            self.error = f"{type(error).__name__}: {error}"


def _text(source: GrammarSource) -> str:
    match source.kind:
        case GrammarKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(source.text, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(source.text)
        case GrammarKind.LARK:
            return LLMatcher.grammar_from_lark(source.text)


def _guarded(build: Callable[[], LLMatcher], source: GrammarSource) -> LLMatcher:
    try:
        return build()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust arrives as a BaseException of its own
        raise _invalid(str(error), source) from None


def _invalid(problem: str, source: GrammarSource) -> InvalidGrammarError:
    return InvalidGrammarError(_first_line(problem), param=source.param)


def _first_line(problem: str) -> str:
    line = " ".join(problem.replace("<non-verbose/>", "").split())
    return line if len(line) <= 300 else f"{line[:300]} …"
