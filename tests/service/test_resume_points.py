"""Training states: written whole, read back exactly, removed when their job ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters.errors import StoreError
from service.resume_points import ResumePoints

URLS = ["local", "memory://resume-points"]


@pytest.fixture(params=URLS)
def points(request: pytest.FixtureRequest, tmp_path: Path) -> ResumePoints:
    return ResumePoints(str(tmp_path) if request.param == "local" else f"{request.param}/{tmp_path.name}")


def test_a_state_comes_back_exactly(points: ResumePoints) -> None:
    state = {"step": 7, "masters": {"a": [torch.randn(3), torch.zeros(2)]}, "best": None}
    loaded = points.load(points.save("ftjob-1", 1, state))
    assert loaded["step"] == 7
    assert torch.equal(loaded["masters"]["a"][0], state["masters"]["a"][0])  # type: ignore[index]


def test_an_attempt_replaces_its_own_state_and_nobody_elses(points: ResumePoints) -> None:
    first = points.save("ftjob-1", 1, {"step": 1})
    second = points.save("ftjob-1", 2, {"step": 2})
    assert points.save("ftjob-1", 2, {"step": 3}) == second
    assert points.load(first)["step"] == 1
    assert points.load(second)["step"] == 3


def test_older_attempts_are_removed_once_a_newer_state_counts(points: ResumePoints) -> None:
    first, second = (points.save("ftjob-1", attempt, {"step": attempt}) for attempt in (1, 2))
    other = points.save("ftjob-2", 1, {"step": 9})
    points.discard("ftjob-1", keep=second)
    with pytest.raises(StoreError, match="cannot be read"):
        points.load(first)
    assert points.load(second)["step"] == 2
    points.discard("ftjob-1")
    points.discard("ftjob-1")
    with pytest.raises(StoreError):
        points.load(second)
    assert points.load(other)["step"] == 9


def test_a_torn_state_is_an_error_and_a_pickled_program_is_never_run(tmp_path: Path) -> None:
    points = ResumePoints(str(tmp_path))
    reference = points.save("ftjob-1", 1, {"step": 1})
    path = tmp_path / "training" / reference
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StoreError):
        points.load(reference)
    torch.save({"step": Path("/")}, path)  # needs a global: refused by weights_only
    with pytest.raises(StoreError):
        points.load(reference)
