"""Base, few-shot prompt and adapter on held-out examples, on a model small enough to learn one answer by heart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import exp

import pytest
import torch

from adapters.assertions import parse_assertions
from adapters.corpus import Codec, build_corpus, render_prompt
from adapters.evaluation import Entrant, Evaluation, EvaluationOptions, choose_shots, last_answer_only, with_shots
from adapters.evaluation_report import ACTIVE, BASE, CANDIDATE, FEW_SHOT
from adapters.example import ChatExample, CompletionExample, Example, Message
from adapters.forgetting import general_texts, measure_forgetting
from adapters.lora import routing
from adapters.lora_weights import LoraSpec
from adapters.packed_loss import PackedLoss
from adapters.recipe import TrainConfig
from adapters.scoring import TaskKind
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


class Scripted:
    """Answers at once: an adapter says "a medlar", the base says nothing to the point."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.calls: list[tuple[str | None, list[list[int]]]] = []

    def __call__(self, prompts: list[list[int]], adapter: str | None, max_tokens: int) -> list[list[int]]:
        self.calls.append((adapter, prompts))
        answer: list[int] = self.codec.tokenizer.encode("a medlar" if adapter else "hm", add_special_tokens=False)
        return [answer[:max_tokens] for _ in prompts]


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
    loop = GreedyLoop(grafted, {"digest": learned, "other": learned}, min(codec.eos_token_ids))
    return Evaluation(codec, PackedLoss(grafted.model, CPU, 512), loop, max_model_len), loop


def _scripted(grafted: GraftedBase, codec: Codec, times: Sequence[float] = ()) -> tuple[Evaluation, Scripted]:
    """`times` are what a clock shows; without any it stands still."""
    script, clock = Scripted(codec), iter(times)
    return Evaluation(codec, PackedLoss(grafted.model, CPU, 512), script, 256, lambda: next(clock, 0.0)), script


def _candidate(learned: TrainableLora, name: str = "digest") -> Entrant:
    return Entrant(name, TrainRouting(learned, training=False))


def test_an_adapter_that_learned_the_answer_wins_over_base_and_few_shot_prompt(
    grafted: GraftedBase, codec: TemplateCodec, learned: TrainableLora
) -> None:
    evaluation, loop = _evaluation(grafted, codec, learned)
    held_out, training = _examples(1, 6), _examples(100, 3)
    report = evaluation.compare(held_out, training, candidate=_candidate(learned), options=EvaluationOptions())
    assert report is not None
    assert (report.task, report.primary) == (TaskKind.LABELS, "accuracy")
    assert (report.num_examples, report.num_left_out, report.num_shots) == (6, 0, 3)
    assert report.scores[CANDIDATE]["accuracy"].value == 1.0
    assert report.scores[BASE]["accuracy"].value == 0.0
    assert report.scores[CANDIDATE]["accuracy"].low == pytest.approx(0.6097, abs=1e-4), "6 of 6 is no certainty"
    assert report.scores[CANDIDATE]["loss"].value < 0.1 < report.scores[BASE]["loss"].value
    assert report.scores[BASE]["perplexity"].value == pytest.approx(exp(report.scores[BASE]["loss"].value))
    against = report.comparisons[BASE]["accuracy"]
    assert (against.gain, against.p) == (1.0, 2 / 2**6)
    assert set(report.comparisons) == {BASE, FEW_SHOT}
    assert [adapter for adapter, _ in loop.calls] == [None, None, "digest"]
    asked = sorted(render_prompt(example, codec) for example in held_out)
    assert sorted(loop.calls[0][1]) == sorted(loop.calls[2][1]) == asked
    written = json.loads(json.dumps(report.as_dict()))
    assert written["scores"]["candidate"]["accuracy"]["value"] == 1.0
    assert written["samples"][0]["answers"]["candidate"] == "a medlar"
    assert "details" not in written
    rows = [json.loads(row) for row in report.table().decode().splitlines()]
    assert sorted(row["line"] for row in rows) == [1, 2, 3, 4, 5, 6]
    assert all(row["scores"] == {"base": 0.0, "few_shot": row["scores"]["few_shot"], "candidate": 1.0} for row in rows)


def test_the_loss_is_that_of_the_last_answer_behind_the_prompt_that_was_generated_from(
    grafted: GraftedBase, codec: TemplateCodec, learned: TrainableLora
) -> None:
    evaluation, loop = _evaluation(grafted, codec, learned)
    report = evaluation.compare(
        _examples(1, 1), _examples(100, 2), candidate=_candidate(learned), options=EvaluationOptions()
    )
    assert report is not None
    answer = [*codec.tokenizer.encode("a medlar", add_special_tokens=False), codec.tokenizer.eos_token_id]
    for contestant, (_, (prompt,)) in zip((BASE, FEW_SHOT), loop.calls, strict=False):
        with torch.no_grad():
            logits = grafted.model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        scores = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
        expected = -scores[torch.arange(len(answer)), torch.tensor(answer)].mean().item()
        assert report.scores[contestant]["loss"].value == pytest.approx(expected, rel=1e-4)


def test_the_loss_of_each_sequence_is_that_of_it_alone(grafted: GraftedBase, codec: TemplateCodec) -> None:
    texts = ["one", "a rather longer answer", "two words"]
    rows: list[Example] = [
        ChatExample(line, (Message("user", "q?"), Message("assistant", text, trained=True)))
        for line, text in enumerate(texts, 1)
    ]
    loss = PackedLoss(grafted.model, CPU, 512)
    corpus = build_corpus(rows, codec, max_length=128)
    nats, counts = loss.per_sequence(corpus, None)
    for index in range(3):
        alone = loss.score(corpus.subset(torch.tensor([index])), None).loss
        assert nats[index] / counts[index] == pytest.approx(alone, rel=1e-5)
    assert sum(nats) / sum(counts) == pytest.approx(loss.score(corpus, None).loss, rel=1e-5)


def test_the_active_version_takes_part(grafted: GraftedBase, codec: TemplateCodec, learned: TrainableLora) -> None:
    evaluation, loop = _evaluation(grafted, codec, learned)
    report = evaluation.compare(
        _examples(1, 3),
        [],
        candidate=_candidate(learned),
        active=_candidate(learned, "other"),
        options=EvaluationOptions(),
    )
    assert report is not None
    assert loop.calls[-1][0] == "other"
    assert report.comparisons[ACTIVE]["accuracy"].gain == 0.0
    assert report.comparisons[ACTIVE]["loss"].p == 1.0


def test_as_many_shots_are_used_as_leave_room_for_the_answer(
    grafted: GraftedBase, codec: TemplateCodec, learned: TrainableLora
) -> None:
    shots = _examples(100, 8)
    lengths = [len(render_prompt(with_shots(_examples(1, 1)[0], shots[:k]), codec)) for k in range(9)]
    evaluation, loop = _evaluation(grafted, codec, learned, max_model_len=lengths[5] + 20)
    report = evaluation.compare(_examples(1, 1), shots, candidate=_candidate(learned), options=EvaluationOptions())
    assert report is not None
    assert report.num_shots == 5
    assert len(loop.calls[1][1][0]) == pytest.approx(lengths[5], abs=4), "other numbers, other tokens"


def test_an_example_without_room_for_an_answer_is_left_out(
    grafted: GraftedBase, codec: TemplateCodec, learned: TrainableLora
) -> None:
    long = ChatExample(9, (Message("user", "very " * 90), Message("assistant", "a", trained=True)))
    evaluation, _ = _evaluation(grafted, codec, learned, max_model_len=100)
    options = EvaluationOptions()
    assert evaluation.compare([long], [], candidate=_candidate(learned), options=options) is None
    report = evaluation.compare([long, *_examples(1, 1)], [], candidate=_candidate(learned), options=options)
    assert report is not None
    assert (report.num_examples, report.num_left_out) == (1, 1)


def test_when_the_time_is_up_everybody_has_answered_the_same_examples(
    grafted: GraftedBase, codec: TemplateCodec, learned: TrainableLora
) -> None:
    evaluation, loop = _scripted(grafted, codec, [0.0, 40.0])
    report = evaluation.compare(
        _examples(1, 40), [], candidate=_candidate(learned), options=EvaluationOptions(max_seconds=60.0)
    )
    assert report is not None
    assert (report.num_examples, report.num_left_out) == (32, 8)
    assert [len(prompts) for _, prompts in loop.calls] == [32, 32, 32]
    assert sorted(row.line for row in report.details) != list(range(1, 33)), "not the beginning of the file"


def test_assertions_of_the_job_and_of_a_line_are_checked_on_every_answer(
    grafted: GraftedBase, codec: TemplateCodec, learned: TrainableLora
) -> None:
    evaluation, _ = _scripted(grafted, codec)
    plain = _examples(1, 3)
    picky = ChatExample(
        9,
        (Message("user", "word 9?"), Message("assistant", "a medlar", trained=True)),
        assertions=parse_assertions([{"regex": "quince"}], "assertions"),
    )
    options = EvaluationOptions(assertions=parse_assertions([{"contains": "medlar"}, {"max_length": 3}], "assertions"))
    report = evaluation.compare([*plain, picky], [], candidate=_candidate(learned), options=options)
    assert report is not None
    assert [result.pass_rate[CANDIDATE] for result in report.assertions] == [1.0, 0.0]
    assert report.assertions[0].pass_rate[BASE] == 0.0
    assert report.assertions[0].assertion == {"contains": "medlar"}
    only_lines = evaluation.compare([*plain, picky], [], candidate=_candidate(learned), options=EvaluationOptions())
    assert only_lines is not None
    assert only_lines.scores[CANDIDATE]["assertions"].value == 0.0, "of the one line that has any"


def test_bad_slices_and_examples_are_shown_first(
    grafted: GraftedBase, codec: TemplateCodec, learned: TrainableLora
) -> None:
    def example(line: int, answer: str, shop: str) -> Example:
        messages = (Message("user", f"word {line}?"), Message("assistant", answer, trained=True))
        return ChatExample(line, messages, metadata={"shop": shop, "all": "same"})

    rows = [example(line, "a medlar", "north") for line in range(1, 7)]
    rows += [example(line, "a quince", "south") for line in range(7, 12)]
    rows += [example(12, "a pear", "east")]
    evaluation, _ = _scripted(grafted, codec)
    options = EvaluationOptions(task=TaskKind.LABELS)
    report = evaluation.compare(rows, [], candidate=_candidate(learned), options=options)
    assert report is not None
    found = [(part.field, part.value, part.num_examples, part.score.value) for part in report.slices]
    assert found == [
        ("label", "a quince", 5, 0.0),
        ("shop", "south", 5, 0.0),
        ("label", "a medlar", 6, 1.0),
        ("shop", "north", 6, 1.0),
    ]
    assert report.slices[0].score.high == pytest.approx(0.4345, abs=1e-4)
    assert report.num_small_slices == 2
    assert len(report.worst_examples) == 5
    assert all(shown.scores[CANDIDATE] == 0.0 for shown in report.worst_examples)
    assert all(shown.metadata["shop"] in ("south", "east") for shown in report.worst_examples)
    losses = [shown.loss for shown in report.worst_examples]
    assert losses == sorted(losses, reverse=True)


def test_forgetting_is_the_ratio_of_perplexities(
    grafted: GraftedBase, codec: TemplateCodec, learned: TrainableLora
) -> None:
    loss = PackedLoss(grafted.model, CPU, 512)
    texts = general_texts()[:6]
    found = measure_forgetting(texts, codec, loss, TrainRouting(learned, training=False), max_length=64, seed=1)
    perplexities = []
    for route in (None, TrainRouting(learned, training=False)):
        nats, count = 0.0, 0
        for text in texts:
            ids = torch.tensor([codec.tokenizer.encode(text)[:64]])
            with torch.no_grad(), routing(route):
                logits = grafted.model(input_ids=ids, use_cache=False).logits[0]
            nats -= torch.log_softmax(logits[:-1], dim=-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum().item()
            count += ids.shape[1] - 1
        perplexities.append(exp(nats / count))
    assert found.base_perplexity == pytest.approx(perplexities[0], rel=1e-4)
    assert found.perplexity == pytest.approx(perplexities[1], rel=1e-4)
    assert found.ratio == pytest.approx(perplexities[1] / perplexities[0], rel=1e-4)
    assert found.low < found.ratio < found.high
    assert found.ratio > 1


def test_an_adapter_that_changes_nothing_forgets_nothing(grafted: GraftedBase, codec: TemplateCodec) -> None:
    spec = LoraSpec(r=4, lora_alpha=8, target_modules=("q_proj",))
    fresh = TrainableLora(spec, grafted.signature, seed=1, device=CPU)
    loss = PackedLoss(grafted.model, CPU, 512)
    route = TrainRouting(fresh, training=False)
    found = measure_forgetting(general_texts()[:3], codec, loss, route, max_length=64, seed=1)
    assert (found.ratio, found.low, found.high) == (1.0, 1.0, 1.0)


def test_the_bundled_texts_are_many_short_paragraphs() -> None:
    texts = general_texts()
    assert 40 <= len(texts) == len(set(texts)) <= 60
    assert all(30 <= len(text.split()) <= 70 for text in texts)


def test_shots_have_different_answers_as_long_as_there_are_any() -> None:
    training = [CompletionExample(line, f"{line}?", "ab"[line % 2]) for line in range(1, 7)]
    assert [shot.line for shot in choose_shots(training, 3)] == [1, 2, 3]
    training[4] = CompletionExample(5, "5?", "c")
    assert [shot.line for shot in choose_shots(training, 4)] == [1, 2, 5, 3]


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
    options = EvaluationOptions(task=TaskKind.LABELS)
    report = evaluation.compare([spaced], [], candidate=_candidate(learned), options=options)
    assert report is not None
    assert report.scores[CANDIDATE]["accuracy"].value == 1.0
