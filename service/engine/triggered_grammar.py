"""Free text in which a grammar holds from each trigger on, until its sentence is complete: tool calls in an answer.

Before the trigger nothing is masked, and it costs nothing. Knows bytes of tokens, not what a call is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from service.engine.grammar import AnyGrammar, Bits, Grammar, Matcher
from service.engine.grammar_source import GrammarOrder


@dataclass(frozen=True)
class TriggeredGrammar:
    """`grammar` describes what follows `trigger`. After `max_uses` sentences the answer ends."""

    grammar: Grammar
    trigger: str
    max_uses: int | None = None

    @property
    def num_words(self) -> int:
        return self.grammar.num_words

    def start(self, ignore_eos: bool = False) -> TriggeredMatcher:
        return TriggeredMatcher(self, ignore_eos)

    def order(self) -> GrammarOrder:
        return replace(self.grammar.order(), trigger=self.trigger, max_uses=self.max_uses)


def carried_out(order: GrammarOrder, grammar: Grammar) -> AnyGrammar:
    """What was ordered, from the compiled grammar of its source."""
    return grammar if order.trigger is None else TriggeredGrammar(grammar, order.trigger, order.max_uses)


class TriggeredMatcher:
    """Where one sequence stands: outside, or inside a sentence that a trigger began. As `Matcher` otherwise."""

    def __init__(self, triggered: TriggeredGrammar, ignore_eos: bool) -> None:
        self._triggered = triggered
        self._trigger = triggered.trigger.encode()
        self._ignore_eos = ignore_eos
        self._seen = b""  # the text behind the last sentence, as much as a trigger is long
        self._inner: Matcher | None = None
        self._uses = 0
        self.error: str | None = None

    @property
    def is_free(self) -> bool:
        return self._inner is None

    @property
    def is_complete(self) -> bool:
        return self._uses == self._triggered.max_uses and self.error is None

    def allowed(self, bits: Bits) -> None:
        if self._inner is None:
            bits.fill(-1)
            return
        self._inner.allowed(bits)
        self.error = self._inner.error

    def consume(self, token_id: int) -> bool:
        if self._inner is None:
            self._look_for_trigger(self._triggered.grammar.bytes_of(token_id))
        else:
            self._inner.consume(token_id)
            self.error = self._inner.error
        if self._inner is not None and self._inner.is_complete:
            self._inner, self._uses = None, self._uses + 1
        return self.error is None

    def _look_for_trigger(self, written: bytes) -> None:
        text = self._seen + written
        at = text.find(self._trigger)
        if at < 0:
            self._seen = text[len(text) - len(self._trigger) + 1 :] if len(text) >= len(self._trigger) else text
            return
        self._seen = b""
        inner = self._triggered.grammar.start(self._ignore_eos)
        if inner.consume_text(text[at + len(self._trigger) :]):
            self._inner = inner  # else the token that brought the trigger went on wrongly: it stays text
