"""Training beside decoding on the one base: what it costs the readers, and what it leaves the learner.

Two loads of 8 rows: "full" decodes without a pause; "half" sends its 8 requests so that the engine is idle for half
of the time, as with people who read what they asked for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import quantiles

from adapters.trainer import Trainer
from bench.goals import goal
from bench.measurement import Entry, Samples, Variant, interleave, quantity, ratio
from bench.plan import Plan
from bench.serving import Row, ServingRig, random_prompts, serving
from bench.subject import Subject
from bench.training import make_trainer, random_corpus
from service import tuning_worker

NUM_ROWS = 8
NUM_TOKENS = 32
TRAINED_EXAMPLES = 8
"""In one training step, the shortest piece of training whose speed can be told."""

LOADS = ("half", "full")
_MIN_STEPS = 2
_PATIENCE = 10
"""A state is watched for so many times its usual duration until two training steps are done."""


def measure(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """Inter-token latency (p99 over decode steps) and training tokens per second, each alone and beside the other."""
    rows = [Row(prompt) for prompt in random_prompts(subject.sizes.vocabulary, NUM_ROWS, 32, 64, seed=4)]
    trainer = make_trainer(subject, random_corpus(subject.sizes.vocabulary, 4 * TRAINED_EXAMPLES), TRAINED_EXAMPLES)
    with serving(subject.base, subject.adapters, max_num_seqs=NUM_ROWS) as rig, _learning(trainer) as learner:
        watch = _Watch(rig, rows, learner, plan.co_serving_seconds)
        periods = {"full": 0.0, "half": 2 * watch.burst_seconds()}
        variants: dict[str, Variant] = {"training alone": watch.training}
        for load in LOADS:
            variants[f"serving alone, {load} load"] = partial(watch.serving, periods[load])
            variants[f"both, {load} load"] = partial(watch.both, periods[load])
        samples = interleave(variants, plan.co_serving_rounds, tick)
    entries = [quantity("training alone.training", samples, "tokens/s")]
    for load in LOADS:
        entries += _entries(load, samples, subject.is_cuda)
    return entries


def _entries(load: str, samples: Samples, cuda: bool) -> list[Entry]:
    alone, both = f"serving alone, {load} load", f"both, {load} load"
    latency, kept = f"p99 beside training ÷ alone, {load} load", f"training kept, {load} load"
    return [
        quantity(f"{alone}.p99", samples, "ms"),
        quantity(f"{both}.p99", samples, "ms"),
        quantity(f"{both}.training", samples, "tokens/s"),
        ratio(latency, samples, f"{both}.p99", f"{alone}.p99", goal(latency, cuda=cuda)),
        ratio(kept, samples, f"{both}.training", "training alone.training", goal(kept, cuda=cuda)),
    ]


class _Learner:
    """Trains in a thread of the priority the service gives its own, whenever it is told to."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._changed = threading.Condition()
        self._wanted = self._working = self._ending = False
        self._started_at = 0.0
        self._steps: list[tuple[float, int]] = []  # when it was done, its tokens
        self._thread = threading.Thread(target=self._loop, name="training", daemon=True)
        self._thread.start()

    @property
    def num_steps(self) -> int:
        """Done since the last `start`."""
        return len(self._steps)

    def start(self) -> None:
        with self._changed:
            self._steps = []
            self._started_at = time.perf_counter()
            self._wanted = True
            self._changed.notify_all()

    def stop(self) -> float:
        """Tokens per second over the steps done by now; the one under way is waited for and not counted."""
        with self._changed:
            self._wanted = False
            done = list(self._steps)
            self._changed.wait_for(lambda: not self._working)
        return sum(num_tokens for _, num_tokens in done) / (done[-1][0] - self._started_at) if done else 0.0

    def close(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join()

    def _loop(self) -> None:
        # The service's own way of standing back, not a copy of it.
        tuning_worker.lower_priority()
        with tuning_worker.background_stream(self._trainer.device):
            while self._may_go_on():
                result = self._trainer.step()
                self._steps.append((time.perf_counter(), result.num_tokens))

    def _may_go_on(self) -> bool:
        """Wait until training is wanted; False when it never will be again."""
        with self._changed:
            self._working = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._wanted or self._ending)
            self._working = not self._ending
            return self._working


@contextmanager
def _learning(trainer: Trainer) -> Iterator[_Learner]:
    learner = _Learner(trainer)
    try:
        yield learner
    finally:
        learner.stop()
        learner.close()


class _Watch:
    """The three states, each watched for some seconds."""

    def __init__(self, rig: ServingRig, rows: list[Row], learner: _Learner, seconds: float) -> None:
        self._rig = rig
        self._rows = rows
        self._learner = learner
        self._seconds = seconds

    def burst_seconds(self) -> float:
        """How long all rows take once; both sides are warm afterwards."""
        self._rig.run(self._rows, NUM_TOKENS)
        self._learner.start()
        self._wait_for_steps(1)
        self._learner.stop()
        start = time.perf_counter()
        for _ in range(3):
            self._rig.run(self._rows, NUM_TOKENS)
        return (time.perf_counter() - start) / 3

    def training(self) -> Mapping[str, float]:
        self._learner.start()
        time.sleep(self._seconds)
        self._wait_for_steps(_MIN_STEPS)
        return {"training": self._learner.stop()}

    def serving(self, period: float) -> Mapping[str, float]:
        return {"p99": self._decode(period, lambda: True)}

    def both(self, period: float) -> Mapping[str, float]:
        self._learner.start()
        p99 = self._decode(period, lambda: self._learner.num_steps >= _MIN_STEPS)
        return {"p99": p99, "training": self._learner.stop()}

    def _decode(self, period: float, enough: Callable[[], bool]) -> float:
        """Send all rows every `period` seconds, or at once when they are done; p99 of a decode step in ms."""
        steps: list[float] = []
        begin = next_at = time.perf_counter()
        while True:
            now = time.perf_counter()
            if now - begin > self._seconds * (1 if enough() else _PATIENCE):
                return quantiles(steps, n=100, method="inclusive")[98] * 1e3
            time.sleep(max(0.0, next_at - now))
            next_at = max(next_at + period, time.perf_counter())
            steps += self._rig.run(self._rows, NUM_TOKENS).step_seconds

    def _wait_for_steps(self, num_steps: int) -> None:
        while self._learner.num_steps < num_steps:
            time.sleep(0.01)
