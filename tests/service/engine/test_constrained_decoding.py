"""Grammars and biases on a real engine with random weights: whatever the model wants, the answer keeps to its form."""

from __future__ import annotations

import asyncio
import json
import random
import re
from contextlib import closing
from typing import Any

import pytest

from service.engine import grammar_source
from service.engine.base_model import BaseModel
from service.engine.errors import RequestRejectedError
from service.engine.grammar import Grammar, Matcher
from service.engine.grammar_compiler import GrammarCompiler
from service.engine.grammar_source import GrammarSource
from service.engine.sequence import FinishReason
from tests.service.engine.conftest import SPECS, Rig

pytestmark = pytest.mark.anyio

PERSON = grammar_source.json_schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "p",
)
TAGS = grammar_source.json_schema(
    {"type": "array", "items": {"enum": ["red", "green", 'bl"ue']}, "minItems": 2, "maxItems": 4}, "p"
)
DATE = grammar_source.regex("20[0-9]{2}-[01][0-9]-[0-3][0-9]", "p")
ANSWER = grammar_source.choice(["positive", "negative", "neither, really"], "p")
SUM = grammar_source.lark('start: NUMBER ("+" NUMBER){0,3}\nNUMBER: /[1-9][0-9]{0,2}/', "p")
SOURCES = [PERSON, TAGS, DATE, ANSWER, SUM]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def grammars(base: BaseModel) -> dict[GrammarSource, Grammar]:
    async def compiled() -> dict[GrammarSource, Grammar]:
        with closing(GrammarCompiler(base)) as compiler:
            return {source: await compiler.compile(source) for source in SOURCES}

    return asyncio.run(compiled())


def keeps_to(source: GrammarSource, text: str) -> bool:
    """Independent of the library that constrained it."""
    if source is PERSON:
        person = json.loads(text)
        return set(person) == {"name", "age"} and len(person["name"]) <= 8 and 0 <= person["age"] <= 150
    if source is TAGS:
        tags = json.loads(text)
        return 2 <= len(tags) <= 4 and set(tags) <= {"red", "green", 'bl"ue'}
    if source is DATE:
        return re.fullmatch("20[0-9]{2}-[01][0-9]-[0-3][0-9]", text) is not None
    if source is ANSWER:
        return text in ("positive", "negative", "neither, really")
    return re.fullmatch(r"[1-9][0-9]{0,2}(\+[1-9][0-9]{0,2}){0,3}", text) is not None


async def answer(rig: Rig, prompt: list[int], adapter: str | None, **sampling: Any) -> tuple[str, FinishReason | None]:
    chunks = await rig.ask(prompt, adapter, **{"max_tokens": 300, "ignore_eos": False, **sampling})
    return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 4}, {"temperature": 2.0, "seed": 5, "top_p": 0.9}]
)
async def test_every_answer_keeps_to_its_form_with_any_adapter(
    sampling: dict[str, float], rig: Rig, grammars: dict[GrammarSource, Grammar]
) -> None:
    asked = [(source, adapter) for source in SOURCES for adapter in (None, *SPECS)]
    answers = await asyncio.gather(
        *(answer(rig, [7, 8, 9], adapter, grammar=grammars[source], **sampling) for source, adapter in asked)
    )
    for (source, _), (text, reason) in zip(asked, answers, strict=True):
        assert keeps_to(source, text) and reason is FinishReason.STOP, text
    assert len({text for text, _ in answers}) > len(SOURCES), "the adapters must differ, or they are not there"


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
async def test_rows_without_a_grammar_are_what_they_are_without_such_neighbours(
    quantization: str, base: BaseModel, nf4_base: BaseModel, grammars: dict[GrammarSource, Grammar]
) -> None:
    rig = Rig(base if quantization == "none" else nf4_base)
    rng = random.Random(6)
    free = [([rng.randrange(5, 500) for _ in range(9)], adapter) for adapter in (None, *SPECS)]
    bound = [(prompt, adapter, source) for (prompt, adapter), source in zip(free, SOURCES, strict=False)]
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 40}
    alone = [await rig.tokens(p, a, **sampling) for p, a in free]
    bound_alone = [await rig.tokens(p, a, **sampling, grammar=grammars[s]) for p, a, s in bound]
    crowd = await asyncio.gather(
        *(rig.tokens(p, a, **sampling) for p, a in free),
        *(rig.tokens(p, a, **sampling, grammar=grammars[s]) for p, a, s in bound),
    )
    rig.engine.shutdown(0)
    assert list(crowd) == alone + bound_alone


@pytest.mark.slow
async def test_a_preempted_answer_goes_on_in_its_grammar_where_it_was(
    base: BaseModel, grammars: dict[GrammarSource, Grammar]
) -> None:
    small = Rig(base, kv_cache_bytes=3 * 512 * base.model.config.num_hidden_layers * 2 * 2 * 32 * 4)
    long = grammar_source.regex("([a-z]{3} [0-9]{3}; ){20,40}", "p")
    with closing(GrammarCompiler(base)) as compiler:
        grammar = await compiler.compile(long)
    rng = random.Random(8)
    asked = [([rng.randrange(5, 500) for _ in range(40)], adapter) for adapter in (None, *SPECS)]
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 2, "max_tokens": 400, "grammar": grammar}
    alone = [await small.tokens(p, a, **sampling) for p, a in asked]
    before = small.engine.stats().num_preemptions
    crowd = await asyncio.gather(*(small.tokens(p, a, **sampling) for p, a in asked))
    preempted = small.engine.stats().num_preemptions
    small.engine.shutdown(0)
    assert before == 0 and preempted > 0, "the budget must be too small for all, or this test shows nothing"
    assert crowd == alone
    texts = [str(base.tokenizer.decode(tokens)) for tokens in crowd]
    assert all(re.fullmatch("([a-z]{3} [0-9]{3}; ){20,40}", text) for text in texts)


async def test_an_answer_ends_when_its_form_is_complete_whatever_ignore_eos_says(
    rig: Rig, grammars: dict[GrammarSource, Grammar]
) -> None:
    for ignore_eos in (False, True):
        text, reason = await answer(rig, [7, 8], None, grammar=grammars[ANSWER], ignore_eos=ignore_eos)
        assert keeps_to(ANSWER, text) and reason is FinishReason.STOP


async def test_ignore_eos_makes_the_longest_answer_the_form_has(rig: Rig, base: BaseModel) -> None:
    with closing(GrammarCompiler(base)) as compiler:
        grammar = await compiler.compile(grammar_source.regex("[ab]{1,12}", "p"))
    text, reason = await answer(rig, [7, 8], None, grammar=grammar, ignore_eos=True)
    assert (len(text), reason) == (12, FinishReason.STOP)


async def test_max_tokens_cuts_a_form_and_says_so(rig: Rig, grammars: dict[GrammarSource, Grammar]) -> None:
    text, reason = await answer(rig, [7, 8], None, grammar=grammars[PERSON], max_tokens=4)
    assert text.startswith("{") and reason is FinishReason.LENGTH
    whole = await rig.tokens([7, 8], None, grammar=grammars[ANSWER])
    _, reason = await answer(rig, [7, 8], None, grammar=grammars[ANSWER], max_tokens=len(whole))
    assert reason is FinishReason.STOP, "an answer that is complete with its last token was not cut"


async def test_a_stop_string_ends_an_answer_inside_its_form(rig: Rig, grammars: dict[GrammarSource, Grammar]) -> None:
    text, reason = await answer(rig, [7, 8], None, grammar=grammars[PERSON], stop=('"age"',))
    assert '"name"' in text and '"age"' not in text and reason is FinishReason.STOP


async def test_a_grammar_that_fails_ends_its_own_request_only(
    rig: Rig, grammars: dict[GrammarSource, Grammar], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await rig.tokens([7, 8, 9])
    allowed = Matcher.allowed

    def failing(matcher: Matcher, bits: Any) -> None:
        allowed(matcher, bits[:-1])  # the wrong size: llguidance raises

    monkeypatch.setattr(Matcher, "allowed", failing)
    broken, healthy = await asyncio.gather(
        rig.ask([7, 8, 9], grammar=grammars[PERSON], ignore_eos=False), rig.tokens([7, 8, 9])
    )
    assert broken[-1].finish_reason is FinishReason.ERROR and "grammar" in (broken[-1].error or "")
    assert "".join(chunk.text for chunk in broken) == "", "nothing that the grammar did not allow gets out"
    assert healthy == expected and rig.engine.stats().alive


async def test_a_bias_bans_and_forces_tokens(rig: Rig) -> None:
    first = (await rig.tokens([7, 8, 9], max_tokens=1))[0]
    assert first not in await rig.tokens([7, 8, 9], max_tokens=30, logit_bias=((first, -100.0),))
    assert await rig.tokens([7, 8, 9], max_tokens=5, logit_bias=((33, 100.0),)) == [33] * 5


async def test_a_bias_of_a_token_that_is_none_is_refused_by_its_id(rig: Rig, base: BaseModel) -> None:
    for token in (base.vocab_size, 10**9):
        with pytest.raises(RequestRejectedError, match=str(token)) as caught:
            await rig.tokens([7, 8, 9], logit_bias=((token, 1.0),))
        assert caught.value.param == "logit_bias"
    assert await rig.tokens([7, 8, 9], logit_bias=((base.vocab_size - 1, 1.0),))
