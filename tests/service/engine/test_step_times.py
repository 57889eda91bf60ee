"""What one who watches the engine learns of its decode steps."""

from __future__ import annotations

import asyncio

import pytest

from service.engine.step_times import CAPACITY, StepTimes
from tests.service.engine.conftest import Rig

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_steps_are_taken_once_and_in_their_order() -> None:
    times = StepTimes()
    times.add(0.1)
    times.add(0.2)
    assert times.take() == [0.1, 0.2]
    assert times.take() == []


def test_what_nobody_takes_is_forgotten() -> None:
    times = StepTimes()
    for number in range(CAPACITY + 5):
        times.add(float(number))
    assert times.take() == [float(number) for number in range(5, CAPACITY + 5)]


async def test_every_token_after_the_first_is_a_step_and_equals_what_its_reader_waited(rig: Rig) -> None:
    await rig.ask([5, 6, 7], max_tokens=10)
    (report,) = rig.ear.reports
    assert rig.engine.step_times.take() == pytest.approx(list(report.inter_token_seconds), abs=1e-6)
    assert len(report.inter_token_seconds) == 9


async def test_a_pause_between_two_requests_is_no_step_and_steps_with_prompts_do_not_count(rig: Rig) -> None:
    await rig.ask([5, 6, 7], max_tokens=4)
    await asyncio.sleep(0.3)
    await rig.ask([5, 6, 7], max_tokens=4)
    steps = rig.engine.step_times.take()
    assert len(steps) == 6 and max(steps) < 0.3
    assert not rig.engine.is_busy
