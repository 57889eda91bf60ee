"""Tokens and their mask: prompts as at inference, answers learned up to the end of the turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters.corpus import Corpus, build_corpus, render_opening, render_prompt, split_validation, tokenize
from adapters.errors import DatasetError
from adapters.example import ChatExample, CompletionExample, Message
from tests.adapters.conftest import CHATML, TemplateCodec

# Earlier answers are shortened in the history, as reasoning models drop their thinking.
FORGETFUL = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'][:2])")
# The generation prompt holds something that the history does not.
THINKING = CHATML.replace("assistant\\n' }}{% endif", "assistant\\nHm. ' }}{% endif")
ENDLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
CHOOSY = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


def _chat(*contents: str, untrained: tuple[int, ...] = (), line: int = 1) -> ChatExample:
    roles = ["user", "assistant"] * len(contents)
    return ChatExample(
        line,
        tuple(
            Message(role, content, trained=role == "assistant" and index not in untrained)
            for index, (role, content) in enumerate(zip(roles, contents, strict=False))
        ),
    )


def _learned(codec: TemplateCodec, tokens: list[int], spans: tuple[tuple[int, int], ...]) -> list[str]:
    return [str(codec.tokenizer.decode(tokens[start:stop])) for start, stop in spans]


def test_only_the_answer_and_its_end_of_turn_are_learned(codec: TemplateCodec) -> None:
    (sequence,) = tokenize(_chat("What is it?", "A tree."), codec)
    assert _learned(codec, sequence.tokens, sequence.spans) == ["A tree.<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, THINKING, FORGETFUL])
def test_what_precedes_the_answer_is_token_for_token_the_prompt_of_inference(
    tiny_llama_dir: Path, template: str
) -> None:
    codec = TemplateCodec(tiny_llama_dir, template)
    example = _chat("When?", "Now and then.", "Where?", "Here.")
    sequence = tokenize(example, codec)[-1]
    served = codec.render_chat([message.as_dict() for message in example.prompt], add_generation_prompt=True)
    assert render_prompt(example, codec) == served
    assert sequence.tokens[: sequence.spans[-1][0]] == served


def test_an_opening_is_the_prompt_of_a_conversations_first_request(codec: TemplateCodec) -> None:
    example = _chat("When?", "Now and then.", "Where?", "Here.", untrained=(1,))
    first = codec.render_chat([{"role": "user", "content": "When?"}], add_generation_prompt=True)
    assert render_opening(example, codec) == first != render_prompt(example, codec)
    completion = CompletionExample(1, "Once upon a time", " there was a medlar")
    assert render_opening(completion, codec) == codec.tokenizer.encode("Once upon a time")


def test_every_weighted_answer_of_a_conversation_is_learned_in_one_sequence(codec: TemplateCodec) -> None:
    (sequence,) = tokenize(_chat("a?", "One.", "b?", "Two.", "c?", "Three.", untrained=(3,)), codec)
    assert _learned(codec, sequence.tokens, sequence.spans) == ["One.<|im_end|>", "Three.<|im_end|>"]


def test_messages_behind_the_last_learned_answer_are_left_out(codec: TemplateCodec) -> None:
    (sequence,) = tokenize(_chat("a?", "One.", "b?", "Two.", untrained=(3,)), codec)
    assert "Two" not in codec.tokenizer.decode(sequence.tokens)


def test_a_template_that_rewrites_the_history_gives_one_sequence_per_answer(tiny_llama_dir: Path) -> None:
    codec = TemplateCodec(tiny_llama_dir, FORGETFUL)
    sequences = tokenize(_chat("a?", "First answer.", "b?", "Second answer."), codec)
    learned = [_learned(codec, sequence.tokens, sequence.spans) for sequence in sequences]
    assert learned == [["First answer.<|im_end|>"], ["Second answer.<|im_end|>"]]
    assert "First answer" not in codec.tokenizer.decode(sequences[1].tokens)


def test_a_template_without_an_end_of_turn_still_teaches_the_model_to_stop(tiny_llama_dir: Path) -> None:
    codec = TemplateCodec(tiny_llama_dir, ENDLESS)
    (sequence,) = tokenize(_chat("a?", "One."), codec)
    assert sequence.tokens[-1] == codec.tokenizer.eos_token_id
    assert sequence.spans[-1][1] == len(sequence.tokens)


def test_a_completion_learns_its_text_and_the_end_and_keeps_the_served_prompt(codec: TemplateCodec) -> None:
    (sequence,) = tokenize(CompletionExample(1, "2 + 2 =", " 4"), codec)
    assert _learned(codec, sequence.tokens, sequence.spans) == [" 4<|im_end|>"]
    assert sequence.tokens[: sequence.spans[0][0]] == codec.tokenizer.encode("2 + 2 =")


def test_a_template_that_refuses_messages_is_a_complaint_with_the_line(tiny_llama_dir: Path) -> None:
    codec = TemplateCodec(tiny_llama_dir, CHOOSY)
    bad = ChatExample(3, (Message("system", "x"), Message("user", "y"), Message("assistant", "z", trained=True)))
    with pytest.raises(DatasetError, match=r"line 3: the model's chat template refuses .*no system role"):
        build_corpus([_chat("a", "b"), bad], codec, max_length=64)


def test_a_corpus_holds_sequences_masks_and_lines(codec: TemplateCodec) -> None:
    examples = [_chat("a?", "One.", line=1), _chat("b?", "Two and more.", line=5)]
    calls: list[int] = []
    corpus = build_corpus(examples, codec, max_length=64, on_example=lambda: calls.append(1))
    assert len(corpus) == 2
    assert len(calls) == 2
    assert corpus.lines.tolist() == [1, 5]
    for index, example in enumerate(examples):
        (expected,) = tokenize(example, codec)
        tokens, trained = corpus.sequence(index)
        assert tokens.tolist() == expected.tokens
        ((start, stop),) = expected.spans
        assert trained.nonzero().squeeze(1).tolist() == list(range(start, stop))
    assert corpus.num_tokens == int(corpus.lengths.sum()) == corpus.tokens.numel()


def test_an_example_that_is_too_long_loses_its_end_and_is_counted(codec: TemplateCodec) -> None:
    prompt = len(render_prompt(_chat("a?", "x"), codec))
    corpus = build_corpus([_chat("a?", "word " * 50), _chat("a?", "b")], codec, max_length=prompt + 4)
    assert corpus.num_truncated == 1
    assert corpus.lengths[0] == prompt + 4
    assert corpus.sequence(0)[1].sum() == 4


def test_an_example_whose_prompt_fills_the_model_is_refused(codec: TemplateCodec) -> None:
    with pytest.raises(DatasetError, match="line 7: the prompt alone fills the model's 16 tokens"):
        build_corpus([_chat("word " * 50, "x", line=7)], codec, max_length=16)


@pytest.mark.parametrize(("count", "held_out"), [(10, 2), (20, 4), (100, 10), (3000, 300), (9000, 512)])
def test_a_split_holds_out_a_share_of_the_examples(count: int, held_out: int) -> None:
    train, valid = split_validation(_numbered(count), seed=1)
    assert (len(train), len(valid)) == (count - held_out, held_out)
    assert not set(train.lines.tolist()) & set(valid.lines.tolist())


def test_a_split_depends_on_its_seed_and_on_nothing_else() -> None:
    corpus = _numbered(100)
    first, again, other = (split_validation(corpus, seed=seed)[1].lines.tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_sequences_of_one_conversation_stay_on_one_side_of_a_split() -> None:
    corpus = _numbered(50)
    doubled = corpus.subset(torch.arange(50).repeat_interleave(2))
    train, valid = split_validation(doubled, seed=3)
    assert not set(train.lines.tolist()) & set(valid.lines.tolist())
    assert (len(train), len(valid)) == (90, 10)


def _numbered(count: int) -> Corpus:
    edges = torch.arange(count + 1)
    return Corpus(
        tokens=torch.arange(count, dtype=torch.int32),
        trained=torch.ones(count, dtype=torch.bool),
        spans=torch.stack([edges[:-1], edges[1:]], dim=1),
        lines=torch.arange(1, count + 1, dtype=torch.int32),
    )
