"""A drift reference: made of prompts, kept in two files, read again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adapters.drift.build import build_reference, principal_components
from adapters.drift.reference import FACTS, TENSORS, DriftReference, read_reference, write_reference
from adapters.errors import DriftReferenceError, TooFewPromptsError
from tests.adapters.drifting import RUN_LENGTH, WIDTH, nothing, numbers, reference, vectors


@pytest.fixture(scope="module")
def made() -> DriftReference:
    return reference(0)


def test_a_reference_is_read_as_it_was_written(made: DriftReference, tmp_path: Path) -> None:
    write_reference(tmp_path, made)
    read = read_reference(tmp_path)
    assert read is not None
    assert (read.basis, read.run_length, read.bandwidth) == ("a base", RUN_LENGTH, made.bandwidth)
    for name in ("mean", "components", "points"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name), strict=True)
    for window in (32, 64):
        np.testing.assert_array_equal(read.thresholds[window], made.thresholds[window], strict=True)
    for name, scalar in made.scalars.items():
        np.testing.assert_array_equal(read.scalars[name].values, scalar.values, strict=True)
        assert (read.scalars[name].threshold, read.scalars[name].allowance) == (scalar.threshold, scalar.allowance)


def test_the_same_prompts_give_the_same_bytes(made: DriftReference, tmp_path: Path) -> None:
    write_reference(tmp_path / "one", made)
    write_reference(tmp_path / "two", reference(0))
    for name in (FACTS, TENSORS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_adapter_without_a_reference_has_none(tmp_path: Path) -> None:
    assert read_reference(tmp_path) is None


@pytest.mark.parametrize("broken", ["no facts", "no tensors", "half the tensors", "another format", "no scalars"])
def test_a_torn_reference_is_refused(made: DriftReference, tmp_path: Path, broken: str) -> None:
    write_reference(tmp_path, made)
    facts, tensors = tmp_path / FACTS, tmp_path / TENSORS
    if broken == "no facts":
        facts.unlink()
    elif broken == "no tensors":
        tensors.unlink()
    elif broken == "half the tensors":
        tensors.write_bytes(tensors.read_bytes()[: tensors.stat().st_size // 2])
    else:
        changed: dict[str, object] = {"format": 99} if broken == "another format" else {"scalars": {"other": {}}}
        facts.write_text(json.dumps(json.loads(facts.read_text()) | changed))
    with pytest.raises(DriftReferenceError, match="tune again"):
        read_reference(tmp_path)


def test_components_come_from_prompts_that_are_no_part_of_the_reference(made: DriftReference) -> None:
    assert made.points.shape == (75, 12)  # of 25 prompts half as many directions
    assert made.components.shape == (12, WIDTH)
    np.testing.assert_allclose(made.components @ made.components.T, np.eye(12), atol=1e-5)


def test_components_are_the_directions_of_most_variance() -> None:
    rows = vectors(np.random.default_rng(0), 500)
    mean, components = principal_components(rows)
    np.testing.assert_allclose(mean, rows.mean(axis=0), atol=1e-5)
    variances = ((rows - mean) @ components.T).var(axis=0)
    assert (np.diff(variances) < 0).all()
    assert variances.sum() == pytest.approx(rows.var(axis=0).sum(), rel=1e-3)


def test_too_few_different_prompts_make_no_reference() -> None:
    rng = np.random.default_rng(0)
    for rows in (vectors(rng, 63), np.repeat(vectors(rng, 40), 5, axis=0)):
        with pytest.raises(TooFewPromptsError, match="64 are needed"):
            build_reference(rows, {}, basis="", run_length=RUN_LENGTH, seed=0, check=nothing)


def test_a_prompt_that_is_there_again_counts_once() -> None:
    rows = vectors(np.random.default_rng(0), 80)
    made = build_reference(
        np.concatenate([rows, rows[:40]]), {}, basis="", run_length=RUN_LENGTH, seed=0, check=nothing
    )
    assert len(made.points) == 60


def test_a_missing_or_infinite_number_is_named() -> None:
    rng = np.random.default_rng(0)
    rows = vectors(rng, 70)
    for values in (np.ones(69), np.full(70, np.nan)):
        with pytest.raises(DriftReferenceError, match="prompt_nll"):
            build_reference(rows, {"prompt_nll": values}, basis="", run_length=RUN_LENGTH, seed=0, check=nothing)


def test_making_a_reference_can_be_stopped() -> None:
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) > 5:
            raise InterruptedError

    rng = np.random.default_rng(0)
    with pytest.raises(InterruptedError):
        build_reference(vectors(rng, 70), numbers(rng, 70), basis="", run_length=RUN_LENGTH, seed=0, check=stop)
