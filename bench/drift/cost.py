"""What an observation and a calibration cost. Random numbers cost what prompts cost. Knows no table."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from adapters.drift.build import build_reference
from adapters.drift.monitor import InputMonitor, OutputMonitor
from adapters.drift.output_monitor import EVENTS, NUMBERS
from bench.drift.plan import Plan
from bench.drift.trial import Row, nothing

SIZES = ((200, 320), (1024, 320), (1024, 4096))
"""Prompts of the reference and width of a hidden state: of the bundled base, of an 8 B model."""
NUM_CALLS = 400


def cost(plan: Plan) -> list[Row]:
    return [*(_input_cost(plan, *size) for size in SIZES), _output_cost(plan)]


def _input_cost(plan: Plan, num_prompts: int, width: int) -> Row:
    rng = np.random.default_rng(plan.seed)
    vectors = rng.standard_normal((num_prompts, width), dtype=np.float32)
    numbers = {name: rng.random(num_prompts) for name in ("prompt_length", "prompt_nll")}
    build = partial(
        build_reference, vectors, numbers, basis="bench", run_length=plan.default_promise, seed=1, check=nothing
    )
    started = time.process_time()
    monitor = InputMonitor(build())
    seconds = time.process_time() - started
    observe = partial(monitor.observe, vectors[0], dict.fromkeys(numbers, 0.5))
    name = f"a prompt; reference of {num_prompts}, hidden size {width}"
    return _row(name, observe, seconds, monitor.state_dict)


def _output_cost(plan: Plan) -> Row:
    rng = np.random.default_rng(plan.seed)
    monitor = OutputMonitor(plan.default_promise, plan.seed)
    while not monitor.needs_calibration:
        answer = {name: float(rng.random()) for name in NUMBERS} | {name: float(rng.random() < 0.3) for name in EVENTS}
        monitor.observe(answer)
    started = time.process_time()
    monitor.calibrate(nothing)
    seconds = time.process_time() - started
    return _row("an answer; six signals", partial(monitor.observe, answer), seconds, monitor.state_dict)


def _row(name: str, observe: Callable[[], object], calibration_seconds: float, state: Callable[[], bytes]) -> Row:
    seconds = []
    for _ in range(NUM_CALLS):
        started = time.perf_counter()
        observe()
        seconds.append(time.perf_counter() - started)
    return {
        "what": name,
        "microseconds": 1e6 * float(np.median(seconds)),
        "calibration_seconds": calibration_seconds,
        "state_bytes": len(state()),
    }
