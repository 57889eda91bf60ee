"""kill -9 at each named step, once: the short run of `python -m tools.kill_jobs`."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.fault_points import STEPS
from tools.kill_jobs.recipes import recipes
from tools.kill_jobs.run import KillRun, undisturbed
from tools.kill_jobs.victims import Nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_after_a_kill_at_each_step_nothing_acknowledged_is_lost(
    born: Nursery, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    choice = recipes()[:1]
    expected = undisturbed(born, tmp_path / "undisturbed", str(tiny_llama_dir), choice)
    run = KillRun(born, tmp_path / "killed", str(tiny_llama_dir), seed=7, choice=choice, plan=STEPS, say=print)
    violations = run.execute(len(STEPS), expected, 600.0)
    print(run.counts())
    assert violations == []
    assert sum(run.kills[step] for step in STEPS) >= len(STEPS) - 3  # the machine may be too slow for some
    assert run.counts()["jobs"]["succeeded"] >= 3
