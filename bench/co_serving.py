"""Training beside decoding on the one base: what it costs the readers, and what it leaves the learner.

8 rows at four loads: at 100 % the next 8 requests are sent when the last are answered, at 25 % four times as seldom, as
with people who read what they asked for. Three ways to share the device: "priorities" is the service without settings,
"target" the service with a latency target, "lock" what one would write first.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median, quantiles

from bench import curve, memory
from bench.goals import goal
from bench.learner import Learner, learning
from bench.measurement import Entry, Samples, Variant, interleave, quantity, ratio
from bench.plan import Plan
from bench.serving import Row, ServingRig, random_prompts, serving
from bench.subject import Subject
from bench.training import make_trainer, random_corpus
from service.training_gate import TrainingGate
from service.training_pace import PaceLimits, TrainingPace
from service.tuning_worker import wait_for_stream, work_clock

NUM_ROWS = 8
NUM_TOKENS = 32
LOCKED_TOKENS = 8
"""With a lock every token waits for a training step: a whole answer would take the place of all other states."""

TRAINED_EXAMPLES = 8
"""In one training step, the shortest piece of training whose speed can be told."""

ARMS = ("priorities", "target", "lock")
TARGET = 1.2
"""Times the 99th percentile of serving alone at that load; what is promised is 1.25."""

_MIN_STEPS = 2
_PATIENCE = 10
"""A state is watched for so many times its usual duration until two training steps are done."""


def measure(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """Inter-token latency (p99 over decode steps) and training tokens per second, each alone and beside the other."""
    rows = [Row(prompt) for prompt in random_prompts(subject.sizes.vocabulary, NUM_ROWS, 32, 64, seed=4)]
    trainer = make_trainer(subject, random_corpus(subject.sizes.vocabulary, 4 * TRAINED_EXAMPLES), TRAINED_EXAMPLES)
    with serving(subject.base, subject.adapters, max_num_seqs=NUM_ROWS) as rig, learning(trainer) as learner:
        watch = _Watch(rig, rows, learner, plan.co_serving_seconds)
        variants: dict[str, Variant] = {"training alone": watch.training, "0 % load, target": watch.idle}
        for load in plan.co_serving_loads:
            variants[f"{load} % load, no training"] = partial(watch.serving, load)
            variants[f"{load} % load, priorities"] = partial(watch.priorities, load)
            variants[f"{load} % load, target"] = partial(watch.target, load)
            variants[f"{load} % load, lock"] = partial(watch.lock, load)
        samples = interleave(variants, plan.co_serving_rounds, tick)
    tick("memory")
    return _entries(samples, plan.co_serving_loads, subject.is_cuda) + memory.entries(subject)


def _entries(samples: Samples, loads: Sequence[int], cuda: bool) -> list[Entry]:
    kept = curve.name("training kept", 0, "target")
    alone = "training alone.training"
    entries = [
        quantity(alone, samples, "tokens/s"),
        ratio(kept, samples, "0 % load, target.training", alone, goal(kept, cuda=cuda)),
    ]
    for load in loads:
        nobody = f"{load} % load, no training"
        entries.append(quantity(f"{nobody}.p99", samples, "ms"))
        if not cuda:  # what a GPU leaves idle, the clock of the CPU does not tell
            entries.append(quantity(f"{nobody}.cores idle", samples, "of 1"))
        for arm in ARMS:
            both = f"{load} % load, {arm}"
            pairs = {
                "p99 ÷ no training": (f"{both}.p99", f"{nobody}.p99"),
                "training kept": (f"{both}.training", alone),
            }
            for what, (numerator, denominator) in pairs.items():
                name = curve.name(what, load, arm)
                entries.append(ratio(name, samples, numerator, denominator, goal(name, cuda=cuda)))
            if not cuda:
                entries.append(_of_idle(samples, load, arm))
    return entries


def _of_idle(samples: Samples, load: int, arm: str) -> Entry:
    """Training kept, of what the cores have left: 1 is all that they do not need for serving."""
    allowed = "training alone, of the cores left.training"
    idle = zip(samples["training alone.training"], samples[f"{load} % load, no training.cores idle"], strict=True)
    with_allowed = {**samples, allowed: [speed * share for speed, share in idle]}
    name = curve.name("training kept ÷ idle part", load, arm)
    return ratio(name, with_allowed, f"{load} % load, {arm}.training", allowed, goal(name, cuda=False))


class _Watch:
    """The states, each watched for some seconds."""

    def __init__(self, rig: ServingRig, rows: list[Row], learner: Learner, seconds: float) -> None:
        self._rig = rig
        self._rows = rows
        self._learner = learner
        self._seconds = seconds
        self._gates: dict[int, TrainingGate] = {}
        self._alone: dict[int, list[float]] = defaultdict(list)
        self._token_seconds = self._burst_seconds() / NUM_TOKENS

    def training(self) -> Mapping[str, float]:
        return self._train_only(None)

    def idle(self) -> Mapping[str, float]:
        """A target that nothing can meet, and nobody who asks."""
        return self._train_only(self._gate(1e-6))

    def serving(self, load: int) -> Mapping[str, float]:
        begin, cpu = time.perf_counter(), time.process_time()
        p99 = self._decode(load)
        self._alone[load].append(p99)
        share = (time.process_time() - cpu) / (time.perf_counter() - begin) / (os.cpu_count() or 1)
        return {"p99": p99, "cores idle": max(0.01, 1 - share)}

    def priorities(self, load: int) -> Mapping[str, float]:
        self._learner.start()
        return self._both(load)

    def target(self, load: int) -> Mapping[str, float]:
        """The gate of a load lives through all rounds, and is watched only when it has met its load.

        Its target comes from three looks at serving alone: a single one may have met somebody else's work.
        """
        gate = self._gates.get(load)
        if gate is None:
            alone = median([*self._alone[load], self._decode(load), self._decode(load)])
            gate = self._gates[load] = self._gate(TARGET * alone / 1e3)
            self._rig.engine.step_times.take()  # of another state
            self._learner.start(partial(gate.hold, _go_on))
            self._both(load)
        self._rig.engine.step_times.take()
        self._learner.start(partial(gate.hold, _go_on))
        return self._both(load)

    def lock(self, load: int) -> Mapping[str, float]:
        """Whoever computes has the device to itself: a decode step, or a training step."""
        lock = threading.Lock()
        with _locked(self._rig, lock):
            self._learner.start(around=lock)
            return self._both(load, LOCKED_TOKENS)

    def _gate(self, target_seconds: float) -> TrainingGate:
        engine = self._rig.engine
        return TrainingGate(
            TrainingPace(PaceLimits(target_seconds)),
            is_serving=lambda: engine.is_busy,
            step_seconds=engine.step_times.take,
            observer=self,
            drain=partial(wait_for_stream, engine.base.device),
            work_clock=work_clock(engine.base.device),
        )

    def training_paced(self, ratio: float, p99_seconds: float | None, held_seconds: float) -> None:
        """The gate's observer: what is measured here is seen from outside."""

    def _burst_seconds(self) -> float:
        """How long all rows take once; both sides are warm afterwards."""
        self._rig.run(self._rows, NUM_TOKENS)
        self._learner.start()
        self._wait_for_steps(1)
        self._learner.stop()
        start = time.perf_counter()
        for _ in range(3):
            self._rig.run(self._rows, NUM_TOKENS)
        return (time.perf_counter() - start) / 3

    def _train_only(self, gate: TrainingGate | None) -> Mapping[str, float]:
        self._learner.start(None if gate is None else partial(gate.hold, _go_on))
        time.sleep(self._seconds)
        self._wait_for_steps(_MIN_STEPS)
        return {"training": self._learner.stop()}

    def _both(self, load: int, num_tokens: int = NUM_TOKENS) -> Mapping[str, float]:
        p99 = self._decode(load, num_tokens, lambda: self._learner.num_steps >= _MIN_STEPS)
        return {"p99": p99, "training": self._learner.stop()}

    def _decode(self, load: int, num_tokens: int = NUM_TOKENS, enough: Callable[[], bool] = lambda: True) -> float:
        """Send all rows as often as the load says, or at once when they are late; p99 of a decode step in ms."""
        period = 0.0 if load == 100 else 100 / load * self._token_seconds * num_tokens
        steps: list[float] = []
        begin = next_at = time.perf_counter()
        while True:
            now = time.perf_counter()
            if now - begin > self._seconds * (1 if enough() else _PATIENCE):
                return quantiles(steps, n=100, method="inclusive")[98] * 1e3
            time.sleep(max(0.0, next_at - now))
            next_at = max(next_at + period, time.perf_counter())
            steps += self._rig.run(self._rows, num_tokens).step_seconds

    def _wait_for_steps(self, num_steps: int) -> None:
        while self._learner.num_steps < num_steps:
            time.sleep(0.01)


@contextmanager
def _locked(rig: ServingRig, lock: threading.Lock) -> Iterator[None]:
    """Every forward of the engine takes the lock. Reaches into it: nobody but this comparison should want that."""
    runner = rig.engine._machinery.runner
    run = runner.run

    def locked(*arguments: object) -> object:
        with lock:
            return run(*arguments)  # type: ignore[arg-type]

    runner.run = locked  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del runner.run


def _go_on() -> None:
    """Nobody stops this training."""
