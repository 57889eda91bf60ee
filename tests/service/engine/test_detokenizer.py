"""Text on the wire: whole characters only, nothing behind a stop string, nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from service.engine.detokenizer import Detokenizer, TokenBytes

TEXT = "naïve café → 🌱🌳 日本語, end.\n\n  two spaces"


def sentencepiece_like() -> PreTrainedTokenizerBase:
    """Byte fallback and a leading space marker, as Llama 2's tokenizer has."""
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "▁": 257, "▁two": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tiny_llama_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama_dir) if request.param == "byte-level" else sentencepiece_like()


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if tokenizer.vocab_size > 300:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids
    return [b + 1 for b in text.encode()]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    one = Detokenizer(tokenizer, TokenBytes(tokenizer), stop)
    return [*(one.push(i) for i in ids), one.flush()], one.stopped


def test_a_stream_joins_to_the_text_and_never_splits_a_character(tokenizer: PreTrainedTokenizerBase) -> None:
    parts, _ = pieces(tokenizer, encode(tokenizer, TEXT))
    assert "".join(parts) == TEXT
    assert not any("�" in part for part in parts)


def test_an_answer_cut_inside_a_character_ends_with_the_replacement_sign(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode(tokenizer, "ok 🌱")[:-1]
    parts, _ = pieces(tokenizer, ids)
    assert "".join(parts).startswith("ok ") and "".join(parts).endswith("�")


def test_invalid_bytes_in_the_middle_do_not_stop_the_stream(tokenizer: PreTrainedTokenizerBase) -> None:
    bad = encode(tokenizer, "🌱")[:1] * 12
    word = encode(tokenizer, " two") if tokenizer.vocab_size > 300 else [258]
    parts, _ = pieces(tokenizer, [*bad, *word])
    assert "".join(parts).endswith(" two")


@pytest.mark.parametrize("stop", ["end", "é →", "日本", ", e", "\n\n"])
def test_a_stop_string_ends_the_text_wherever_tokens_fall(stop: str, tokenizer: PreTrainedTokenizerBase) -> None:
    parts, stopped = pieces(tokenizer, encode(tokenizer, TEXT), (stop, "never"))
    assert stopped
    assert "".join(parts) == TEXT[: TEXT.index(stop)]


def test_the_first_of_several_stop_strings_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    parts, _ = pieces(tokenizer, encode(tokenizer, "one two three"), ("three", "two"))
    assert "".join(parts) == "one "


def test_what_only_looked_like_a_stop_string_comes_out_late_but_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    parts, stopped = pieces(tokenizer, encode(tokenizer, "ababac and abab"), ("ababx",))
    assert "".join(parts) == "ababac and abab" and not stopped


def test_token_bytes_join_to_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    table = TokenBytes(tokenizer)
    assert b"".join(table.of(i) for i in encode(tokenizer, TEXT)).decode() == TEXT


def test_special_tokens_are_no_text(tiny_llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    ids = [tokenizer.eos_token_id, *encode(tokenizer, "hi"), tokenizer.eos_token_id]
    assert "".join(pieces(tokenizer, ids)[0]) == "hi"
