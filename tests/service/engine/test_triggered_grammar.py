"""Text that is free until a trigger: masked only inside what the trigger began, in one batch with everything else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from service.engine import grammar_source
from service.engine.base_model import BaseModel
from service.engine.grammar import Grammar
from service.engine.grammar_compiler import GrammarCompiler
from service.engine.sequence import FinishReason
from service.engine.triggered_grammar import TriggeredGrammar, TriggeredMatcher
from tests.service.engine.conftest import SPECS, Rig

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def digits(base: BaseModel) -> Iterator[Grammar]:
    with closing(GrammarCompiler(base)) as compiler:
        yield asyncio.run(compiler.compile(grammar_source.regex("[0-9]{3}!", "p")))


def write(matcher: TriggeredMatcher, base: BaseModel, text: str) -> None:
    for token in base.tokenizer.encode(text, add_special_tokens=False):
        assert matcher.consume(token), matcher.error


def free(matcher: TriggeredMatcher) -> bool:
    return matcher.is_free


def num_allowed(matcher: TriggeredMatcher, grammar: Grammar) -> int:
    bits = np.empty(grammar.num_words, dtype=np.int32)
    matcher.allowed(bits)
    return int(np.unpackbits(bits.view(np.uint8)).sum())


def test_the_grammar_holds_from_the_trigger_to_the_end_of_its_sentence(base: BaseModel, digits: Grammar) -> None:
    matcher = TriggeredGrammar(digits, "<call>").start()
    everything = digits.num_words * 32
    write(matcher, base, "free <cal l> text, <")
    assert free(matcher) and num_allowed(matcher, digits) == everything
    write(matcher, base, "call")
    assert free(matcher)
    write(matcher, base, ">")
    assert not free(matcher) and 0 < num_allowed(matcher, digits) <= 20
    write(matcher, base, "123!")
    assert free(matcher) and not matcher.is_complete
    write(matcher, base, " and <call>456!")
    assert free(matcher) and not matcher.is_complete and matcher.error is None


def test_what_a_token_brings_behind_the_trigger_counts_or_makes_it_text(base: BaseModel, digits: Grammar) -> None:
    token = next(t for t in range(5, 512) if len(digits.bytes_of(t)) >= 3 and digits.bytes_of(t).isalpha())
    text = digits.bytes_of(token).decode()
    matcher = TriggeredGrammar(digits, text[:2]).start()
    assert matcher.consume(token) and free(matcher), "letters are no digits: the trigger was part of a word"
    letters = GrammarCompiler(base)
    with closing(letters):
        grammar = asyncio.run(letters.compile(grammar_source.regex("[a-zA-Z]{40}", "p")))
    matcher = TriggeredGrammar(grammar, text[:2]).start()
    assert matcher.consume(token) and not free(matcher)
    write(matcher, base, "a" * (40 - len(text[2:])))
    assert free(matcher)


def test_after_its_last_use_the_answer_is_complete(base: BaseModel, digits: Grammar) -> None:
    matcher = TriggeredGrammar(digits, "<call>", max_uses=2).start()
    write(matcher, base, "<call>123!")
    assert not matcher.is_complete
    write(matcher, base, "<call>123!")
    assert matcher.is_complete


def test_a_forbidden_token_inside_is_an_error(base: BaseModel, digits: Grammar) -> None:
    matcher = TriggeredGrammar(digits, "<call>").start()
    write(matcher, base, "<call>1")
    assert not matcher.consume(base.tokenizer.encode("x")[-1]) and matcher.error


@pytest.mark.slow
async def test_on_an_engine_every_trigger_is_followed_by_its_grammar(rig: Rig, digits: Grammar) -> None:
    triggered = TriggeredGrammar(digits, "~")
    [tilde] = [token for token in range(5, 512) if b"~" in digits.bytes_of(token)]
    sampling: dict[str, Any] = {"temperature": 1.0, "max_tokens": 80}
    bias = ((tilde, 5.0),)  # or it would come too rarely to show anything
    bound = [
        rig.ask([7, 8, 9], adapter, seed=seed, grammar=triggered, logit_bias=bias, **sampling)
        for adapter in (None, *SPECS)
        for seed in (1,)
    ]
    free = [rig.tokens([7, 8, 9], a, seed=1, **sampling) for a in (None, *SPECS)]
    answers = await asyncio.gather(*bound)
    texts = ["".join(chunk.text for chunk in chunks) for chunks in answers]
    found = 0
    for text in texts:
        *parts, last = text.split("~")
        for part in parts[1:]:
            found += 1
            assert re.match("[0-9]{3}!", part), part
        assert not parts or re.match("[0-9]{3}!|[0-9]{0,3}$", last), last
    assert found > 10, "the trigger must come by itself, or this test shows nothing"
    assert await asyncio.gather(*free) == [await rig.tokens([7, 8, 9], a, seed=1, **sampling) for a in (None, *SPECS)]


async def test_on_an_engine_the_last_use_ends_the_answer(rig: Rig, digits: Grammar) -> None:
    once = TriggeredGrammar(digits, "~", max_uses=1)
    [tilde] = [token for token in range(5, 512) if b"~" in digits.bytes_of(token)]
    chunks = await rig.ask([7, 8, 9], grammar=once, temperature=1.0, seed=1, max_tokens=300, logit_bias=((tilde, 3.0),))
    text = "".join(chunk.text for chunk in chunks)
    assert re.search("~[0-9]{3}!$", text) and chunks[-1].finish_reason is FinishReason.STOP
