"""Decides which sequences compute what in the next step. Knows no tensors, no HTTP and no clock but arrival.

Each step: running sequences decode one token; prefills go on, chunk by chunk; waiting sequences are admitted
while seats, token budget, cache and adapter slots last. Chunks lie on a fixed grid of the prompt, never cut to
fit a step, so a sequence is computed in the same pieces whoever else is running.

Fairness between tenants is the virtual token counter of S-LoRA's sequel (arXiv 2401.00588): the tenant that has
been served least goes first, and a tenant that returns from idling is lifted to the least of the active ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from service.engine.sequence import Sequence, SequenceStatus


@dataclass(frozen=True)
class Work:
    """Compute tokens [position, position + num_tokens) of a sequence. `samples`: its last logits choose a token."""

    sequence: Sequence
    num_tokens: int
    is_prefill: bool
    samples: bool


@dataclass
class Plan:
    """One step's work, prefills before decodes, and the sequences whose adapter could not be had."""

    prefills: list[Work] = field(default_factory=list)
    decodes: list[Work] = field(default_factory=list)
    rejected: list[tuple[Sequence, Exception]] = field(default_factory=list)

    @property
    def work(self) -> list[Work]:
        return self.prefills + self.decodes


class Admission(Enum):
    """What became of an attempt to start a sequence."""

    STARTED = "started"
    LATER = "later"  # its adapter is on the way or has no slot; others may start before it
    FULL = "full"  # no cache left; nobody starts before it


class Resources(Protocol):
    """What a sequence needs while it runs; kept by the engine."""

    def acquire(self, sequence: Sequence) -> Admission:
        """Cache row and adapter slot for a sequence that starts."""

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for this many tokens; False when the cache is full."""

    def release(self, sequence: Sequence) -> None:
        """Give everything back."""


class TokenCounters:
    """Weighted tokens each tenant has been served."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}

    def arrive(self, tenant: str, active: set[str]) -> None:
        """Lift a tenant that had nothing to do: idling earns no credit."""
        floor = min((self._served.get(t, 0.0) for t in active), default=0.0)
        self._served[tenant] = max(self._served.get(tenant, 0.0), floor)

    def charge(self, tenant: str, weight: float) -> None:
        self._served[tenant] = self._served.get(tenant, 0.0) + weight

    def served(self, tenant: str) -> float:
        return self._served.get(tenant, 0.0)

    def forget_idle(self, active: set[str]) -> None:
        """Keep the table as small as the set of active tenants, plus the highest mark for those who return."""
        self._served = {t: v for t, v in self._served.items() if t in active}


class Scheduler:
    """`waiting` and `running`, and the plan for the next step."""

    def __init__(
        self,
        resources: Resources,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefill_chunk: int,
        on_preempt: Callable[[Sequence], None] | None = None,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs + prefill_chunk:
            raise ValueError(
                f"max_num_batched_tokens={max_num_batched_tokens} must hold a decode token for each of"
                f" max_num_seqs={max_num_seqs} and one prefill chunk of {prefill_chunk}"
            )
        self._resources = resources
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.prefill_chunk = prefill_chunk
        self.counters = TokenCounters()
        self.running: list[Sequence] = []
        self._waiting: dict[str, deque[Sequence]] = {}
        self._on_preempt = on_preempt
        self._preempted_now = False

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._waiting)

    def waiting(self) -> Iterator[Sequence]:
        for queue in self._waiting.values():
            yield from queue

    def add(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        active = self._active()
        if tenant not in active:
            self.counters.arrive(tenant, active)
            if not active:
                self.counters.forget_idle({tenant})
        self._enqueue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence and free what it held."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._resources.release(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self._dequeue(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self) -> Plan:
        """The next step's work. Never empty while something could run."""
        plan = Plan()
        budget = self.max_num_batched_tokens
        self._preempted_now = False
        for sequence in list(self.running):
            if sequence.status is SequenceStatus.RUNNING and not sequence.is_prefill and self._make_room(sequence):
                plan.decodes.append(Work(sequence, 1, False, sequence.samples_next))
                budget -= 1
        plan.decodes = [w for w in plan.decodes if w.sequence.status is SequenceStatus.RUNNING]
        for sequence in self.running:
            if sequence.is_prefill:
                budget -= self._plan_chunk(sequence, plan, budget)
        if not self._preempted_now and len(self.running) < self.max_num_seqs:  # else no need to rank who waits
            self._admit(plan, budget)
        for work in plan.work:
            self.counters.charge(work.sequence.request.tenant, work.num_tokens if work.is_prefill else 2.0)
        return plan

    def _plan_chunk(self, sequence: Sequence, plan: Plan, budget: int) -> int:
        """Plan the sequence's next chunk if the whole of it fits; returns the tokens taken."""
        left = sequence.num_prompt_tokens - sequence.num_computed
        length = min(left, self.prefill_chunk)
        if length > budget:
            return 0
        samples = length == left and not sequence.output_token_ids and not sequence.needs_all_hidden
        plan.prefills.append(Work(sequence, length, True, samples))
        return length

    def _admit(self, plan: Plan, budget: int) -> None:
        for sequence in self._in_order():
            first = min(sequence.num_prompt_tokens, self.prefill_chunk)
            if len(self.running) >= self.max_num_seqs or first > budget:
                return
            try:
                admission = self._resources.acquire(sequence)
                if admission is Admission.FULL:
                    return
                if admission is Admission.LATER:
                    continue
            except Exception as error:  # whatever it is, it concerns this sequence alone
                self._dequeue(sequence)
                sequence.status = SequenceStatus.FINISHED
                plan.rejected.append((sequence, error))
                continue
            self._dequeue(sequence)
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            budget -= self._plan_chunk(sequence, plan, budget)

    def _in_order(self) -> list[Sequence]:
        """Waiting sequences: higher priority first, then the least served tenant, then first come."""
        rank: list[tuple[int, float, float, int, Sequence]] = []
        for tenant, queue in self._waiting.items():
            served = self.counters.served(tenant)
            for index, sequence in enumerate(queue):
                rank.append((-sequence.request.priority, served + index, sequence.arrival, index, sequence))
        rank.sort(key=lambda entry: entry[:4])
        return [entry[4] for entry in rank]

    def _make_room(self, sequence: Sequence) -> bool:
        """Extend a decoding sequence by a token, preempting the least deserving ones if the cache is full."""
        while not self._resources.extend(sequence, sequence.num_computed + 1):
            victim = max(self.running, key=lambda s: (-s.request.priority, s.arrival))
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of its queue; it will be replayed from its tokens, bit for bit."""
        self.running.remove(sequence)
        self._resources.release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self._preempted_now = True
        self._waiting.setdefault(sequence.request.tenant, deque()).appendleft(sequence)
        if self._on_preempt is not None:
            self._on_preempt(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        self._waiting.setdefault(sequence.request.tenant, deque()).append(sequence)

    def _dequeue(self, sequence: Sequence) -> None:
        queue = self._waiting[sequence.request.tenant]
        queue.remove(sequence)
        if not queue:
            del self._waiting[sequence.request.tenant]

    def _active(self) -> set[str]:
        return set(self._waiting) | {s.request.tenant for s in self.running}
