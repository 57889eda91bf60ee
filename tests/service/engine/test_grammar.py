"""Matchers against a slow reference, and the compiler: kept, shared, bounded, for every kind of tokenizer."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from service.engine import grammar_compiler, grammar_source
from service.engine.base_model import BaseModel
from service.engine.detokenizer import TokenBytes
from service.engine.errors import GrammarsUnavailableError, InvalidGrammarError, QueueFullError
from service.engine.grammar import Grammar, Matcher
from service.engine.grammar_compiler import GrammarCompiler
from service.engine.grammar_source import GrammarSource
from tests.conftest import CORPUS

pytestmark = pytest.mark.anyio

CHOICES = ["yes", "yes, twice", 'no "q"', "line\nbreak", "back\\slash", "café 🌱", "<|im_end|>"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def compiler(base: BaseModel) -> Iterator[GrammarCompiler]:
    with closing(GrammarCompiler(base)) as made:
        yield made


def allowed(grammar: Grammar, matcher: Matcher, num_tokens: int) -> list[int]:
    bits = np.empty(grammar.num_words, dtype=np.int32)
    matcher.allowed(bits)
    flags = np.unpackbits(bits.view(np.uint8), bitorder="little", count=num_tokens)
    return [int(token) for token in np.flatnonzero(flags)]


def walk(grammar: Grammar, num_tokens: int, seed: int, ignore_eos: bool = False) -> list[int]:
    """A random sentence of the grammar, as tokens."""
    rng, matcher, tokens = random.Random(seed), grammar.start(ignore_eos), list[int]()
    while not matcher.is_complete:
        tokens.append(rng.choice(allowed(grammar, matcher, num_tokens)))
        assert matcher.consume(tokens[-1]), matcher.error
        assert len(tokens) < 400
    return tokens


@pytest.mark.slow
async def test_the_tokens_allowed_are_those_a_slow_look_at_every_token_finds(
    base: BaseModel, compiler: GrammarCompiler
) -> None:
    grammar = await compiler.compile(grammar_source.choice(CHOICES, "p"))
    token_bytes = TokenBytes(base.tokenizer)
    plain = [token for token in range(base.vocab_size) if not token_bytes.is_special(token)]
    wanted = [each.encode() for each in CHOICES]
    for seed in range(30):
        rng, matcher, written = random.Random(seed), grammar.start(), b""
        while not matcher.is_complete:
            expected = {t for t in plain if any(w.startswith(written + token_bytes.of(t)) for w in wanted)}
            if written in wanted:
                expected |= base.eos_token_ids
            got = set(allowed(grammar, matcher, base.vocab_size))
            # a text that is forced may be forced in the tokenizer's own tokens
            assert got and got <= expected and (got == expected or len(got) == 1)
            token = rng.choice(sorted(got))
            assert matcher.consume(token)
            if token in base.eos_token_ids:
                break
            written += token_bytes.of(token)
        assert written in wanted


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_is_sampled_the_json_parses(seed: int, base: BaseModel, compiler: GrammarCompiler) -> None:
    properties = {"name": {"type": "string", "maxLength": 9}, "n": {"type": "integer", "minimum": -5, "maximum": 99}}
    schema = {"type": "object", "properties": properties, "required": ["name", "n"], "additionalProperties": False}
    grammar = await compiler.compile(grammar_source.json_schema(schema, "p"))
    text = base.tokenizer.decode(walk(grammar, base.vocab_size, seed), skip_special_tokens=True)
    parsed = json.loads(str(text))
    assert list(parsed) == ["name", "n"] and len(parsed["name"]) <= 9 and -5 <= parsed["n"] <= 99
    assert " " * 17 not in str(text), "white space is bounded"


async def test_ignore_eos_ends_only_where_nothing_else_can_come(base: BaseModel, compiler: GrammarCompiler) -> None:
    grammar = await compiler.compile(grammar_source.regex("a{1,6}", "p"))
    lengths = {len(str(base.tokenizer.decode(walk(grammar, base.vocab_size, s, ignore_eos=True)))) for s in range(20)}
    assert lengths == {6}
    ends = [walk(grammar, base.vocab_size, seed) for seed in range(20)]
    assert any(tokens[-1] in base.eos_token_ids for tokens in ends)


async def test_a_token_that_the_grammar_forbids_is_an_error_and_nothing_more(
    base: BaseModel, compiler: GrammarCompiler
) -> None:
    grammar = await compiler.compile(grammar_source.regex("[0-9]+", "p"))
    matcher = grammar.start()
    assert not matcher.consume(base.tokenizer.convert_tokens_to_ids("a"))  # type: ignore[arg-type]
    assert matcher.error and not matcher.is_complete
    assert not matcher.consume(base.tokenizer.convert_tokens_to_ids("1"))  # type: ignore[arg-type]
    assert len(allowed(grammar, matcher, base.vocab_size)) == base.vocab_size
    assert len(allowed(grammar, grammar.start(), base.vocab_size)) < base.vocab_size, "others are not touched"


async def test_a_text_is_accepted_only_whole(compiler: GrammarCompiler) -> None:
    grammar = await compiler.compile(grammar_source.choice(["yes", "yes it is"], "p"))
    assert grammar.accepts("yes") and grammar.accepts("yes it is")
    assert not grammar.accepts("yes it") and not grammar.accepts("no") and not grammar.accepts("")


@pytest.mark.parametrize(
    "source",
    [
        lambda: grammar_source.json_schema({"$ref": "https://example.com/schema.json"}, "p"),
        lambda: grammar_source.json_schema({"$ref": "file:///etc/passwd"}, "p"),
        lambda: grammar_source.json_schema({"$ref": "#/$defs/missing"}, "p"),
        lambda: grammar_source.json_schema({"$ref": "#"}, "p"),
        lambda: grammar_source.json_schema({"type": "bogus"}, "p"),
        lambda: grammar_source.json_schema({"type": "integer", "minimum": 5, "maximum": 3}, "p"),
        lambda: grammar_source.json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "p"),
        lambda: grammar_source.json_schema({"type": "string", "format": "phone"}, "p"),
        lambda: grammar_source.json_schema({"type": "string", "pattern": "(?=a)b"}, "p"),
        lambda: grammar_source.json_schema({"type": "integer", "multipleOf": 999_999_937}, "p"),
        lambda: grammar_source.json_schema({"enum": []}, "p"),
        lambda: grammar_source.regex("(", "p"),
        lambda: grammar_source.regex("(a)\\1", "p"),
        lambda: grammar_source.regex("(" * 3000 + "a" + ")" * 3000, "p"),
        lambda: grammar_source.lark("start: start", "p"),
        lambda: grammar_source.lark("start: (" + "(" * 5000, "p"),
        lambda: grammar_source.lark("begin: 'a'", "p"),
        lambda: grammar_source.lark("", "p"),
        lambda: grammar_source.json_schema({"type": "integer", "minimum": 10**400}, "p"),
    ],
)
async def test_what_cannot_be_compiled_is_refused_with_the_fields_name(source: Any, compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidGrammarError) as caught:
        await compiler.compile(source())
    assert caught.value.param == "p" and "'p'" in caught.value.message


async def test_a_grammar_is_compiled_once_however_many_ask_and_kept(compiler: GrammarCompiler) -> None:
    source = grammar_source.choice(["a", "b"], "p")
    first, *others = await asyncio.gather(*(compiler.compile(source) for _ in range(20)))
    assert compiler.num_compiled == 1 and all(other is first for other in others)


async def test_the_least_recently_used_grammar_goes_first(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_CACHED", 2)
    a, b, c = (grammar_source.choice([name], "p") for name in "abc")
    for source in (a, b, a, c, a):
        await compiler.compile(source)
    assert compiler.num_compiled == 3
    await compiler.compile(b)
    assert compiler.num_compiled == 4


async def test_large_sources_do_not_pile_up(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_CACHED_BYTES", 100)
    big = grammar_source.choice(["x" * 80], "p")
    for source in (big, grammar_source.choice(["y" * 80], "p"), big):
        await compiler.compile(source)
    assert compiler.num_compiled == 3


async def test_a_failure_is_told_to_each_request_by_its_own_field(compiler: GrammarCompiler) -> None:
    sources = [grammar_source.regex("(", param) for param in ("a.regex", "b.regex")]
    errors = await asyncio.gather(*(compiler.compile(source) for source in sources), return_exceptions=True)
    assert [error.param for error in errors if isinstance(error, InvalidGrammarError)] == ["a.regex", "b.regex"]
    assert all(f"'{source.param}'" in str(error) for source, error in zip(sources, errors, strict=True))


async def test_who_waits_too_long_is_told_whose_fault_it_is(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    quick = Grammar.compile

    def slow(source: GrammarSource, tokenizer: Any) -> Grammar:
        release.wait(30)
        return quick(source, tokenizer)

    monkeypatch.setattr(Grammar, "compile", slow)
    running = [grammar_source.choice([str(i)], "p") for i in range(grammar_compiler.NUM_THREADS)]
    errors = await asyncio.gather(*(compiler.compile(s, 0.05) for s in running), return_exceptions=True)
    assert all(isinstance(error, InvalidGrammarError) and "longer than" in str(error) for error in errors)
    queued = grammar_source.choice(["queued"], "p")
    with pytest.raises(QueueFullError):
        await compiler.compile(queued, 0.05)
    monkeypatch.setattr(grammar_compiler, "MAX_PENDING", len(running) + 1)
    with pytest.raises(QueueFullError):
        await compiler.compile(grammar_source.choice(["one too many"], "p"))
    release.set()
    assert (await compiler.compile(queued)).accepts("queued"), "what took long is kept all the same"


@dataclass(frozen=True)
class Vocabulary:
    """As much of a base as a compiler needs."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    eos_token_ids: frozenset[int]


def sentencepiece_like(kind: str) -> PreTrainedTokenizerFast:
    """Spaces as ▁ and one before the text, as in Llama 2's and T5's tokenizers."""
    special = ["<unk>", "<s>", "</s>"]
    trainer: Any
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "bytes", fuse_unk=True))
        single = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "bytes" else []
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special + single, show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    if kind == "bytes":
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
async def test_tokenizers_that_are_not_byte_level_follow_grammars_too(kind: str) -> None:
    tokenizer = sentencepiece_like(kind)
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    base = Vocabulary(tokenizer, len(tokenizer) + 9, frozenset({end}))  # padded, as many vocabularies are
    wanted = ["yes it is", "no", '{"a": [1, 2]}']
    with closing(GrammarCompiler(base)) as compiler:
        grammar = await compiler.compile(grammar_source.choice(wanted, "p"))
        texts = {
            str(tokenizer.decode(walk(grammar, base.vocab_size, seed), skip_special_tokens=True)) for seed in range(12)
        }
        assert texts == set(wanted)
        assert grammar.accepts("yes it is") and not grammar.accepts("yes")


async def test_a_tokenizer_without_a_usable_vocabulary_makes_a_clear_refusal_and_no_failure_at_start() -> None:
    with closing(GrammarCompiler(Vocabulary("no tokenizer at all", 10, frozenset({0})))) as compiler:  # type: ignore[arg-type]
        with pytest.raises(GrammarsUnavailableError) as caught:
            await compiler.compile(grammar_source.choice(["a"], "response_format"))
        assert caught.value.param == "response_format" and caught.value.code == "structured_outputs_unavailable"
