"""Each metric against a value worked out by hand, or against the library that defines it."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

from adapters.scoring import (
    PRIMARY,
    Metric,
    TaskKind,
    canonical,
    pass_rate,
    rouge_l,
    score_answers,
    task_kind,
    token_loss,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _value(metrics: list[Metric], name: str) -> float:
    (metric,) = (metric for metric in metrics if metric.name == name)
    return float(metric.finish(metric.rows.sum(axis=0)))


@pytest.mark.parametrize(
    ("outputs", "kind"),
    [
        (["yes", "no"] * 10, TaskKind.LABELS),
        (["card broken"] * 5, TaskKind.LABELS),
        ([f"label {i % 6}" for i in range(18)], TaskKind.LABELS),
        ([f"label {i % 7}" for i in range(18)], TaskKind.TEXT),
        (["line one\nline two"] * 9, TaskKind.TEXT),
        (["w " * 60] * 9, TaskKind.TEXT),
        (['{"a": 1}'] * 9 + ["no"], TaskKind.JSON),
        (['{"a": 1}'] * 8 + ["no"] * 2, TaskKind.LABELS),
        (["[1, 2]", '{"b": []}'], TaskKind.JSON),
        (["12", "7"] * 10, TaskKind.LABELS),
    ],
)
def test_the_kind_of_a_task_is_told_by_its_outputs(outputs: list[str], kind: TaskKind) -> None:
    assert task_kind(outputs) is kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [("harbour-bank", TaskKind.LABELS), ("copper-kettle", TaskKind.JSON), ("lantern-hotels", TaskKind.TEXT)],
)
def test_the_kinds_of_the_example_sets_are_told_apart(name: str, kind: TaskKind) -> None:
    rows = (EXAMPLES / name / "train.jsonl").read_text().splitlines()
    assert task_kind([json.loads(row)["messages"][-1]["content"] for row in rows]) is kind


def test_the_primary_metric_comes_first_and_is_a_mean_over_examples() -> None:
    for kind in TaskKind:
        first = score_answers(kind, ["a"], ["a"])[0]
        assert first.name == PRIMARY[kind] and first.values is not None


def test_accuracy_and_macro_f1() -> None:
    expected = ["a", "a", "a", "b", "c"]
    answers = ["a", "a", "b", " b ", "none of them"]
    metrics = score_answers(TaskKind.LABELS, answers, expected)
    assert _value(metrics, "accuracy") == pytest.approx(3 / 5)
    # a: said 2, right 2, expected 3 -> 4/5; b: said 2, right 1, expected 1 -> 2/3; c: 0
    assert _value(metrics, "macro_f1") == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)


def test_a_label_that_a_resample_lacks_is_not_averaged() -> None:
    metric = score_answers(TaskKind.LABELS, ["a", "b"], ["a", "b"])[1]
    assert metric.finish(metric.rows[:1].sum(axis=0)) == 1.0


def test_json_is_compared_as_values_and_broken_json_is_counted() -> None:
    expected = ['{"a": 1, "b": [true]}'] * 4
    answers = ['{"b":[true],"a":1}', '{"a": 1}', '{"a": 1', '{"a": 1, "b": [true]}  ']
    metrics = score_answers(TaskKind.JSON, answers, expected)
    assert _value(metrics, "exact_match") == pytest.approx(2 / 4)
    assert _value(metrics, "valid_json") == pytest.approx(3 / 4)


def test_what_is_no_json_never_equals_json() -> None:
    assert canonical("1.0") != canonical("text 1.0")
    assert canonical("a  b") == canonical("a b")
    assert canonical("[" * 100_000) == canonical(" " + "[" * 100_000)


def test_exact_match_of_text_ignores_white_space() -> None:
    assert _value(score_answers(TaskKind.TEXT, [" a  b\n", "a c"], ["a b", "a b"]), "exact_match") == 0.5


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("", "the cat", 0.0),
        ("dog", "the cat", 0.0),
        ("The cat was on the mat", "the cat sat on the mat", 2 * 5 / 12),  # the cat on the mat
        ("b a", "a b", 2 * 1 / 4),
        ("Äpfel!", "äpfel", 1.0),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(answer: str, expected: str, value: float) -> None:
    assert rouge_l(answer, expected) == pytest.approx(value)


def test_bleu_is_sacrebleus_corpus_bleu() -> None:
    answers = ["the cat sat on the mat today", "a dog", "no match here at all", "it is it is it"]
    expected = ["the cat sat on a mat today", "a dog barked", "completely different words", "it is what it is"]
    for count in range(1, 5):
        found = _value(score_answers(TaskKind.TEXT, answers[:count], expected[:count]), "bleu")
        reference = BLEU(effective_order=True).corpus_score(answers[:count], [expected[:count]]).score / 100
        assert found == pytest.approx(reference)
    assert _value(score_answers(TaskKind.TEXT, ["x"], ["y"]), "bleu") == 0.0
    assert _value(score_answers(TaskKind.TEXT, [""], ["y z"]), "bleu") == 0.0


def test_chrf_of_one_character_n_grams_by_hand() -> None:
    # "ab" against "ac": of orders 1 and 2, precision and recall 1/2 and 0, so F2 of the averages 1/4
    assert _value(score_answers(TaskKind.TEXT, ["ab"], ["ac"]), "chrf") == pytest.approx(0.25)
    assert _value(score_answers(TaskKind.TEXT, ["same words"], ["same words"]), "chrf") == pytest.approx(1.0)


def test_loss_and_perplexity_weigh_every_token_the_same() -> None:
    metrics = token_loss(np.array([2.0, 1.0]), np.array([1.0, 5.0]))
    assert _value(metrics, "loss") == pytest.approx(0.5)
    assert _value(metrics, "perplexity") == pytest.approx(exp(0.5))
    assert not any(metric.higher_is_better for metric in metrics)


def test_examples_without_assertions_do_not_count_for_the_pass_rate() -> None:
    metric = pass_rate(np.array([1.0, 0.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.0, 1.0]))
    assert metric.finish(metric.rows.sum(axis=0)) == pytest.approx(2 / 3)
