"""What kind of task the expected answers make, and the metrics that fit it. Knows no model and no file.

| kind | primary | beside it |
|---|---|---|
| labels | accuracy | macro_f1 |
| json | exact_match (canonical JSON) | valid_json |
| text | chrf | exact_match, bleu, rouge_l |

Every metric but the token loss lies in 0..1. What decides is the primary one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from adapters.statistics import Finish, Rows, mean_rows, ratio

MAX_LABEL_CHARACTERS = 100
MAX_LABELS = 1000
MIN_JSON_SHARE = 0.9
MAX_BLEU_ORDER = 4


class TaskKind(StrEnum):
    LABELS = "labels"
    JSON = "json"
    TEXT = "text"


PRIMARY = {TaskKind.LABELS: "accuracy", TaskKind.JSON: "exact_match", TaskKind.TEXT: "chrf"}


@dataclass(frozen=True)
class Metric:
    """`rows` and `finish` as in `adapters.statistics`. `values` [n] are the examples' own, where they have any."""

    name: str
    rows: Rows
    finish: Finish
    higher_is_better: bool = True
    values: NDArray[np.float64] | None = None


def task_kind(outputs: Sequence[str]) -> TaskKind:
    """JSON when nine tenths parse to an object or a list; labels when outputs are short, on one line, and a third as
    many as examples at most; otherwise text."""
    if sum(_is_structure(_json(output)) for output in outputs) >= MIN_JSON_SHARE * len(outputs):
        return TaskKind.JSON
    labels = {plain(output) for output in outputs}
    short = all(len(label) <= MAX_LABEL_CHARACTERS for label in labels) and not any("\n" in o.strip() for o in outputs)
    return TaskKind.LABELS if short and len(labels) <= min(len(outputs) / 3, MAX_LABELS) else TaskKind.TEXT


def plain(text: str) -> str:
    """White space does not tell two answers apart."""
    return " ".join(text.split())


def score_answers(
    kind: TaskKind, answers: Sequence[str], expected: Sequence[str], on_example: Callable[[], None] = lambda: None
) -> list[Metric]:
    """The metrics of the kind, the primary one first. `on_example` is called after each example of what takes long."""
    if kind is TaskKind.LABELS:
        return [_mean("accuracy", _same(answers, expected, plain)), _macro_f1(answers, expected)]
    if kind is TaskKind.JSON:
        valid = np.array([_json(answer) is not _INVALID for answer in answers], dtype=np.float64)
        return [_mean("exact_match", _same(answers, expected, canonical)), _mean("valid_json", valid)]
    return [
        _mean("chrf", _chrf(answers, expected, on_example)),
        _mean("exact_match", _same(answers, expected, plain)),
        _bleu(answers, expected, on_example),
        _mean("rouge_l", np.array([rouge_l(a, e) for a, e in zip(answers, expected, strict=True)])),
    ]


def token_loss(nats: NDArray[np.float64], num_tokens: NDArray[np.float64]) -> list[Metric]:
    """Of the expected answers, [n] each: mean negative log likelihood per token, and its exponential."""
    rows = np.stack([nats, num_tokens], axis=1)
    means = nats / num_tokens
    return [
        Metric("loss", rows, ratio, higher_is_better=False, values=means),
        Metric("perplexity", rows, _perplexity, higher_is_better=False),
    ]


def pass_rate(passed: NDArray[np.float64], concerned: NDArray[np.float64]) -> Metric:
    """Share of the concerned examples that passed; both [n] of 0 and 1."""
    return Metric("assertions", np.stack([passed * concerned, concerned], axis=1), ratio)


def canonical(text: str) -> str:
    """JSON whatever the order of its keys and its spacing; what is no JSON is compared as text."""
    value = _json(text)
    return "text:" + plain(text) if value is _INVALID else "json:" + json.dumps(value, sort_keys=True)


def rouge_l(answer: str, expected: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), case folded."""
    mine, wanted = re.findall(r"\w+", answer.casefold()), re.findall(r"\w+", expected.casefold())
    common = LCSseq.similarity(mine, wanted)
    return 2 * common / (len(mine) + len(wanted)) if common else 0.0


def _mean(name: str, values: NDArray[np.float64]) -> Metric:
    return Metric(name, mean_rows(values), ratio, values=values)


def _same(answers: Sequence[str], expected: Sequence[str], form: Callable[[str], str]) -> NDArray[np.float64]:
    return np.array([form(a) == form(e) for a, e in zip(answers, expected, strict=True)], dtype=np.float64)


def _macro_f1(answers: Sequence[str], expected: Sequence[str]) -> Metric:
    """Mean F1 over the labels that the (re)sample's expected answers hold. rows: [n, 3 x labels], for each label
    whether it was rightly said, said, expected."""
    labels = {label: index for index, label in enumerate(sorted({plain(label) for label in expected}))}
    rows = np.zeros((len(expected), 3, len(labels)))
    for row, answer, wanted in zip(rows, map(plain, answers), map(plain, expected), strict=True):
        row[0, labels[wanted]] = answer == wanted
        if answer in labels:
            row[1, labels[answer]] = 1
        row[2, labels[wanted]] = 1

    def finish(sums: Rows) -> NDArray[np.float64]:
        right, said, wanted = np.split(sums, 3, axis=-1)
        f1 = 2 * right / np.maximum(said + wanted, 1)
        return np.asarray((f1 * (wanted > 0)).sum(axis=-1) / (wanted > 0).sum(axis=-1))

    return Metric("macro_f1", rows.reshape(len(expected), -1), finish)


def _bleu(answers: Sequence[str], expected: Sequence[str], on_example: Callable[[], None]) -> Metric:
    """Corpus BLEU from sacrebleu's own n-gram counts of each sentence. rows: [n, 10], matches and totals of the four
    orders, lengths of answer and reference."""
    scorer = BLEU(effective_order=True)
    rows = []
    for answer, wanted in zip(answers, expected, strict=True):
        score = scorer.sentence_score(answer, [wanted])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
        on_example()
    return Metric("bleu", np.array(rows, dtype=np.float64), corpus_bleu)


def corpus_bleu(sums: Rows) -> NDArray[np.float64]:
    """[..., 10] -> [...]: geometric mean of the precisions of the orders that occur, zeros smoothed exponentially
    (Chen and Cherry 2014, method 3), times the brevity penalty. As sacrebleu with effective_order."""
    matches, totals = sums[..., :MAX_BLEU_ORDER], sums[..., MAX_BLEU_ORDER : 2 * MAX_BLEU_ORDER]
    occurs, none = totals > 0, (totals > 0) & (matches == 0)
    smoothed = 1 / (2.0 ** np.cumsum(none, axis=-1) * np.maximum(totals, 1))
    precision = np.where(none, smoothed, matches / np.maximum(totals, 1))
    logs = np.where(occurs, np.log(np.maximum(precision, 1e-300)), 0.0).sum(axis=-1)
    length, wanted = sums[..., -2], sums[..., -1]
    brevity = np.exp(np.minimum(0.0, 1 - wanted / np.maximum(length, 1)))
    score = brevity * np.exp(logs / np.maximum(occurs.sum(axis=-1), 1))
    return np.asarray(np.where(matches.sum(axis=-1) > 0, score, 0.0))


def _chrf(answers: Sequence[str], expected: Sequence[str], on_example: Callable[[], None]) -> NDArray[np.float64]:
    """chrF2 (Popovic 2015) of each answer; reports show the mean."""
    scorer = CHRF()
    scores = []
    for answer, wanted in zip(answers, expected, strict=True):
        scores.append(scorer.sentence_score(answer, [wanted]).score)
        on_example()
    return np.array(scores, dtype=np.float64) / 100


def _perplexity(sums: Rows) -> NDArray[np.float64]:
    return np.asarray(np.exp(np.minimum(ratio(sums), 700.0)))


_INVALID = object()


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _INVALID


def _is_structure(value: object) -> bool:
    return isinstance(value, dict | list)
