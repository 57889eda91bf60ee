"""What a comparison of contestants found: scores with intervals, significance, slices, edge cases. Knows no model.

Everything is computed from each contestant's answers and losses on the same examples, and from a seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.assertions import Assertion
from adapters.example import CompletionExample, Example
from adapters.scoring import PRIMARY, Metric, TaskKind, pass_rate, score_answers, token_loss
from adapters.slices import Slice, find_slices
from adapters.statistics import Comparison, Estimate, Resampling, proportion

CANDIDATE, BASE, FEW_SHOT, ACTIVE = "candidate", "base", "few_shot", "active"

MAX_SHOWN_EXAMPLES = 5
MAX_SHOWN_CHARACTERS = 500


@dataclass(frozen=True)
class Performance:
    """One contestant on all examples, in their order. `nats` and `num_tokens` [n] are of the expected answers."""

    answers: tuple[str, ...]
    nats: NDArray[np.float64]
    num_tokens: NDArray[np.float64]


@dataclass(frozen=True)
class Forgetting:
    """`ratio` is the adapter's perplexity over the base's: 1 is nothing forgotten. 95 % interval over the texts."""

    num_texts: int
    base_perplexity: float
    perplexity: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class ShownExample:
    """One example with everybody's answer, texts shortened. `scores` are each contestant's primary metric on it, `loss`
    the candidate's on the expected answer, in nats per token."""

    line: int
    prompt: str
    expected: str
    answers: Mapping[str, str]
    scores: Mapping[str, float]
    loss: float
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class AssertionResult:
    """How often an assertion of the job held, by contestant. The lines' own count in the metric `assertions` only."""

    assertion: Mapping[str, Any]
    pass_rate: Mapping[str, float]


@dataclass(frozen=True)
class EvaluationReport:
    """`scores` by contestant and metric; `comparisons` of the candidate with each other contestant, by metric.

    `active_model` is the version behind the job's alias that `active` is. `num_left_out` examples had no room for an
    answer or no time. `slices` hold at least `adapters.slices.MIN_EXAMPLES` examples each, the worst first.
    """

    task: TaskKind
    num_examples: int
    num_left_out: int
    num_shots: int
    scores: Mapping[str, Mapping[str, Estimate]]
    comparisons: Mapping[str, Mapping[str, Comparison]]
    assertions: tuple[AssertionResult, ...] = ()
    slices: tuple[Slice, ...] = ()
    num_small_slices: int = 0
    worst_examples: tuple[ShownExample, ...] = ()
    samples: tuple[ShownExample, ...] = ()
    details: tuple[ShownExample, ...] = ()
    source: str = ""
    active_model: str | None = None
    forgetting: Forgetting | None = None

    @property
    def primary(self) -> str:
        return PRIMARY[self.task]

    def completed(self, forgetting: Forgetting, *, source: str, active_model: str | None) -> EvaluationReport:
        """With what the answers alone do not tell."""
        return replace(self, forgetting=forgetting, source=source, active_model=active_model)

    def as_dict(self) -> dict[str, Any]:
        """JSON values; what has no value (an empty resample) is None. Without `details`, which are `table`'s."""
        found: dict[str, Any] = _json_values({"primary": self.primary, **asdict(replace(self, details=()))})
        del found["details"]
        return found

    def table(self) -> bytes:
        """Every example with answers and scores, a JSON object a line."""
        rows = (json.dumps(_json_values(asdict(row)), ensure_ascii=False) for row in self.details)
        return "".join(row + "\n" for row in rows).encode(errors="replace")


def make_report(
    examples: Sequence[Example],
    performances: Mapping[str, Performance],
    kind: TaskKind,
    *,
    assertions: Sequence[Assertion],
    seed: int,
    num_left_out: int,
    num_shots: int,
    on_example: Callable[[], None] = lambda: None,
) -> EvaluationReport:
    """`performances` must hold CANDIDATE; everybody answered the same `examples`, of which there is at least one.

    Scoring is pure Python: `on_example` lets the caller yield the interpreter, or stop.
    """
    expected = [example.answer for example in examples]
    checks = [(*assertions, *example.assertions) for example in examples]
    metrics = {
        name: _metrics(kind, expected, checks, performance, on_example) for name, performance in performances.items()
    }
    resampling = Resampling(len(examples), seed)
    scores = {name: {metric.name: _estimate(resampling, metric) for metric in found} for name, found in metrics.items()}
    comparisons = {
        name: {
            mine.name: _compare(resampling, mine, other) for mine, other in zip(metrics[CANDIDATE], found, strict=True)
        }
        for name, found in metrics.items()
        if name != CANDIDATE
    }
    primary = {name: _values(found, PRIMARY[kind]) for name, found in metrics.items()}
    slices, num_small = find_slices(examples, primary[CANDIDATE], primary.get(BASE), by_label=kind is TaskKind.LABELS)
    losses = _values(metrics[CANDIDATE], "loss")
    shown = [
        _shown(
            example,
            {name: performance.answers[index] for name, performance in performances.items()},
            {name: float(values[index]) for name, values in primary.items()},
            float(losses[index]),
        )
        for index, example in enumerate(examples)
    ]
    worst = sorted(shown, key=lambda item: (item.scores[CANDIDATE], -item.loss))
    return EvaluationReport(
        task=kind,
        num_examples=len(examples),
        num_left_out=num_left_out,
        num_shots=num_shots,
        scores=scores,
        comparisons=comparisons,
        assertions=tuple(_assertion_result(assertion, performances) for assertion in assertions),
        slices=slices,
        num_small_slices=num_small,
        worst_examples=tuple(worst[:MAX_SHOWN_EXAMPLES]),
        samples=tuple(shown[:MAX_SHOWN_EXAMPLES]),
        details=tuple(shown),
    )


def _metrics(
    kind: TaskKind,
    expected: Sequence[str],
    checks: Sequence[Sequence[Assertion]],
    performance: Performance,
    on_example: Callable[[], None],
) -> list[Metric]:
    found = score_answers(kind, performance.answers, expected, on_example)
    found += token_loss(performance.nats, performance.num_tokens)
    if any(checks):
        passed = []
        for answer, own in zip(performance.answers, checks, strict=True):
            passed.append(float(all(check.holds(answer) for check in own)))
            on_example()
        found.append(pass_rate(np.array(passed), np.array([float(bool(own)) for own in checks])))
    return found


def _estimate(resampling: Resampling, metric: Metric) -> Estimate:
    """Where all examples are right, or all wrong, every resample is the same: Wilson's interval claims less."""
    if metric.values is not None and (all(metric.values == 0.0) or all(metric.values == 1.0)):
        return proportion(metric.values)
    return resampling.estimate(metric.rows, metric.finish)


def _compare(resampling: Resampling, mine: Metric, other: Metric) -> Comparison:
    return resampling.compare(mine.rows, other.rows, mine.finish, higher_is_better=mine.higher_is_better)


def _values(metrics: Sequence[Metric], name: str) -> NDArray[np.float64]:
    (values,) = (metric.values for metric in metrics if metric.name == name)
    assert values is not None, "primary metrics and the loss are means over examples"
    return values


def _assertion_result(assertion: Assertion, performances: Mapping[str, Performance]) -> AssertionResult:
    rates = {name: float(np.mean([assertion.holds(a) for a in p.answers])) for name, p in performances.items()}
    return AssertionResult(assertion.as_dict(), rates)


def _shown(example: Example, answers: Mapping[str, str], scores: Mapping[str, float], loss: float) -> ShownExample:
    prompt = example.prompt if isinstance(example, CompletionExample) else example.prompt[-1].content
    return ShownExample(
        line=example.line,
        prompt=prompt[-MAX_SHOWN_CHARACTERS:],
        expected=example.answer[:MAX_SHOWN_CHARACTERS],
        answers={name: answer[:MAX_SHOWN_CHARACTERS] for name, answer in answers.items()},
        scores=scores,
        loss=loss,
        metadata=dict(example.metadata),
    )


def _json_values(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
