"""Base, few-shot prompt and adapter on held-out examples, on a model small enough to learn one answer by heart."""

from __future__ import annotations

import json
from math import exp

import pytest
import torch

from adapters.corpus import Codec, build_corpus, render_prompt
from adapters.dataset import ChatExample, CompletionExample, Example, Message
from adapters.evaluation import Evaluation, last_answer_only, with_shots
from adapters.lora import routing
from adapters.packed_loss import PackedLoss
from adapters.peft_format import LoraSpec
from adapters.recipe import TrainConfig
from adapters.trainable import TrainableLora, TrainRouting
from adapters.trainer import Trainer
from tests.adapters.conftest import GraftedBase, TemplateCodec

CPU = torch.device("cpu")


def _examples(start: int, count: int) -> list[Example]:
    return [
        ChatExample(line, (Message("user", f"word {line}?"), Message("assistant", "a medlar", trained=True)))
        for line in range(start, start + count)
    ]


class GreedyLoop:
    """The slow reference of an engine: one prompt, one token at a time, no cache."""

    def __init__(self, base: GraftedBase, adapters: dict[str, TrainableLora], end: int) -> None:
        self.base = base
        self.adapters = adapters
        self.end = end
        self.calls: list[tuple[str | None, list[list[int]]]] = []

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], adapter: str | None, max_tokens: int) -> list[list[int]]:
        self.calls.append((adapter, prompts))
        route = TrainRouting(self.adapters[adapter], training=False) if adapter else None
        outputs = []
        for prompt in prompts:
            tokens = list(prompt)
            while len(tokens) < len(prompt) + max_tokens and (len(tokens) == len(prompt) or tokens[-1] != self.end):
                with routing(route):
                    logits = self.base.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
                tokens.append(int(logits[0, -1].argmax()))
            outputs.append(tokens[len(prompt) :])
        return outputs


@pytest.fixture(scope="module")
def learned(grafted: GraftedBase, codec: TemplateCodec) -> TrainableLora:
    """An adapter that answers everything with "a medlar"."""
    everything = tuple(sorted({name.rsplit(".", 1)[-1] for name in grafted.signature.modules}))
    spec = LoraSpec(r=8, lora_alpha=16, target_modules=everything)
    adapter = TrainableLora(spec, grafted.signature, seed=1, device=CPU)
    config = TrainConfig(num_epochs=8, batch_size=4, learning_rate=5e-3, seed=1, eval_every=100)
    train = build_corpus(_examples(100, 20), codec, max_length=128)
    trainer = Trainer(grafted.model, adapter, train, build_corpus(_examples(200, 2), codec, max_length=128), config)
    while not trainer.done:
        trainer.step()
    return adapter


def _evaluation(
    grafted: GraftedBase, codec: Codec, learned: TrainableLora, max_model_len: int = 256
) -> tuple[Evaluation, GreedyLoop]:
    loop = GreedyLoop(grafted, {"digest": learned}, min(codec.eos_token_ids))
    return Evaluation(codec, PackedLoss(grafted.model, CPU, 512), loop, max_model_len), loop


def test_an_adapter_that_learned_the_answer_wins_over_base_and_few_shot_prompt(
    grafted: GraftedBase, codec: TemplateCodec, learned: TrainableLora
) -> None:
    evaluation, loop = _evaluation(grafted, codec, learned)
    held_out, shots = _examples(1, 4), _examples(100, 3)
    report = evaluation.compare(held_out, shots, adapter="digest", route=TrainRouting(learned, training=False))
    assert report is not None
    assert (report.num_examples, report.num_shots) == (4, 3)
    assert report.adapter.exact_match == 1.0
    assert report.base.exact_match == 0.0
    assert report.adapter.loss < 0.1 < report.base.loss
    assert report.adapter.perplexity == pytest.approx(exp(report.adapter.loss))
    assert [sample.adapter for sample in report.samples] == ["a medlar"] * 4
    assert [adapter for adapter, _ in loop.calls] == [None, None, "digest"]
    assert loop.calls[0][1] == loop.calls[2][1] == [render_prompt(example, codec) for example in held_out]
    written = json.loads(json.dumps(report.as_dict()))
    assert written["adapter"]["exact_match"] == 1.0
    assert written["samples"][0]["line"] == 1


def test_the_loss_is_that_of_the_last_answer_behind_the_prompt_that_was_generated_from(
    grafted: GraftedBase, codec: TemplateCodec, learned: TrainableLora
) -> None:
    evaluation, loop = _evaluation(grafted, codec, learned)
    report = evaluation.compare(
        _examples(1, 1), _examples(100, 2), adapter="digest", route=TrainRouting(learned, training=False)
    )
    assert report is not None
    answer = [*codec.tokenizer.encode("a medlar", add_special_tokens=False), codec.tokenizer.eos_token_id]
    for contestant, (_, (prompt,)) in zip((report.base, report.few_shot), loop.calls, strict=False):
        with torch.no_grad():
            logits = grafted.model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        scores = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
        expected = -scores[torch.arange(len(answer)), torch.tensor(answer)].mean().item()
        assert contestant.loss == pytest.approx(expected, rel=1e-4)


def test_as_many_shots_are_used_as_leave_room_for_the_answer(
    grafted: GraftedBase, codec: TemplateCodec, learned: TrainableLora
) -> None:
    shots = _examples(100, 8)
    lengths = [len(render_prompt(with_shots(_examples(1, 1)[0], shots[:k]), codec)) for k in range(9)]
    evaluation, loop = _evaluation(grafted, codec, learned, max_model_len=lengths[5] + 20)
    report = evaluation.compare(_examples(1, 1), shots, adapter="digest", route=TrainRouting(learned))
    assert report is not None
    assert report.num_shots == 5
    assert len(loop.calls[1][1][0]) == lengths[5]


def test_an_example_without_room_for_an_answer_is_left_out(
    grafted: GraftedBase, codec: TemplateCodec, learned: TrainableLora
) -> None:
    long = ChatExample(9, (Message("user", "very " * 90), Message("assistant", "a", trained=True)))
    evaluation, _ = _evaluation(grafted, codec, learned, max_model_len=100)
    route = TrainRouting(learned)
    assert evaluation.compare([long], [], adapter="digest", route=route) is None
    report = evaluation.compare([long, *_examples(1, 1)], [], adapter="digest", route=route)
    assert report is not None
    assert report.num_examples == 1


def test_shots_stand_between_the_system_message_and_the_question() -> None:
    system, question = Message("system", "Be brief."), Message("user", "b?")
    example = ChatExample(1, (system, question, Message("assistant", "B", trained=True)))
    shot = ChatExample(2, (Message("system", "x"), Message("user", "a?"), Message("assistant", "A", trained=True)))
    prompted = with_shots(example, [shot])
    assert isinstance(prompted, ChatExample)
    assert [message.content for message in prompted.messages] == ["Be brief.", "a?", "A", "b?", "B"]
    last_only = last_answer_only(prompted)
    assert isinstance(last_only, ChatExample)
    assert [message.trained for message in last_only.messages] == [False] * 4 + [True]


def test_shots_of_completions_are_paragraphs() -> None:
    prompted = with_shots(CompletionExample(1, "3+3=", "6"), [CompletionExample(2, "1+1=", "2")])
    assert prompted == CompletionExample(1, "1+1=2\n\n3+3=", "6")


def test_white_space_does_not_decide_a_match(
    grafted: GraftedBase, codec: TemplateCodec, learned: TrainableLora
) -> None:
    evaluation, _ = _evaluation(grafted, codec, learned)
    spaced = ChatExample(1, (Message("user", "word 1?"), Message("assistant", " a  medlar\n", trained=True)))
    report = evaluation.compare([spaced], [], adapter="digest", route=TrainRouting(learned))
    assert report is not None
    assert report.adapter.exact_match == 1.0
