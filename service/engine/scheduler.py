"""Decides which sequences compute what in the next step. Knows no tensors, no HTTP and no clock but arrival.

Each step: running sequences decode one token; then prompt chunks and admissions, the least served tenant's first
(`waiting.py`), while seats, token budget, cache and adapter slots last. Chunks lie on a fixed grid of the prompt, never
cut to fit a step, so a sequence is computed in the same pieces whoever else is running.
A prompt starts behind what is known of it; while another sequence is just computing more of it, it waits in its seat.

Seats are shared too. When all are taken, a tenant with less than its equal share of them takes one from the tenant with
the most above its own: that sequence is *paused*. It keeps its cache row and adapter slot, loses no work, and goes on
with the next free seat. Seats move only from above a share to below one, so they never move back and forth.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from math import ceil
from typing import Protocol

from service.engine.plan import Plan, Work
from service.engine.sequence import Sequence, SequenceStatus
from service.engine.waiting import TokenCounters, WaitingQueue, background

_DECODE_WEIGHT = 2.0
"""What a generated token counts beside one of the prompt (arXiv 2401.00588)."""

_CACHED_WEIGHT = 0.1
"""What a prompt token that was known already counts beside one that is computed."""


class Admission(Enum):
    """What became of an attempt to start a sequence."""

    STARTED = "started"
    LATER = "later"  # its adapter is on the way; others may start before it
    NO_SLOT = "no slot"  # its adapter is there and every slot is in use; others may start before it, for a while
    FULL = "full"  # no cache left; nobody starts before it


class Resources(Protocol):
    """What a sequence needs while it runs; kept by the engine."""

    def acquire(self, sequence: Sequence) -> Admission:
        """Cache row and adapter slot for a sequence that starts."""

    def match(self, sequence: Sequence) -> int | None:
        """Prompt tokens known already; None while a running sequence is computing more of them, sure to go on."""

    def fetch(self, sequence: Sequence, num_tokens: int) -> None:
        """Put the known tokens in place, as many as `match` said; the rest will be computed now."""

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for this many tokens; False when the cache is full."""

    def release(self, sequence: Sequence) -> None:
        """Give everything back."""

    def keep_for(self, sequences: Iterable[Sequence]) -> None:
        """Let an adapter slot run empty for each of these, which have been passed over for long enough."""


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
        self._seats: Counter[str] = Counter()  # of `running`, by tenant
        self.paused: list[Sequence] = []
        self.waiting = WaitingQueue()
        self._starving: list[Sequence] = []
        self._on_preempt = on_preempt
        self._preempted_now = False

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        active = self._active()
        if tenant not in active:
            self.counters.arrive(tenant, active)
            if not active:
                self.counters.forget_idle({tenant})
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence and free what it held."""
        if sequence.status is SequenceStatus.RUNNING:
            self._leave(sequence)
            self._resources.release(sequence)
        elif sequence.status is not SequenceStatus.FINISHED:
            self._dequeue(sequence)
            if sequence in self.paused:
                self.paused.remove(sequence)
                self._resources.release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self) -> Plan:
        """The next step's work. Never empty while something could run."""
        plan = Plan()
        self._preempted_now = False
        for sequence in list(self.running):
            if sequence.status is SequenceStatus.RUNNING and not sequence.is_prefill:
                self._plan_decode(sequence, plan)
        budget = self.max_num_batched_tokens - len(plan.decodes)
        prefilling = deque(sorted((s for s in self.running if s.is_prefill), key=self._merit))
        if not self._preempted_now and (claimants := self._claimants()):
            budget = self._admit(claimants, plan, budget, prefilling)
        for sequence in prefilling:
            budget -= self._plan_chunk(sequence, plan, budget)
        plan.decodes = [w for w in plan.decodes if w.sequence.status is SequenceStatus.RUNNING]
        plan.prefills = [w for w in plan.prefills if w.sequence.status is SequenceStatus.RUNNING]
        for work in plan.work:
            self._charge(work)
        return plan

    def upcoming(self, limit: int) -> list[str]:
        """The adapters that the next waiting sequences need, in the order in which they will probably start."""
        wanted: dict[str, None] = {}
        for sequence in self.waiting.in_order(self.waiting.tenants, self._served, self.prefill_chunk, ahead=True):
            if sequence.request.adapter is not None:
                wanted[sequence.request.adapter] = None
            if len(wanted) == limit:
                break
        return list(wanted)

    # -- admission --------------------------------------------------------------------------------------------

    def _admit(self, claimants: Collection[str], plan: Plan, budget: int, prefilling: deque[Sequence]) -> int:
        """Start or resume waiting sequences in fair order, prompts under way among them; returns the budget left."""
        passed: list[Sequence] = []
        for sequence in self.waiting.in_order(claimants, self._served, self.prefill_chunk):
            while prefilling and self._merit(prefilling[0]) <= self._merit(sequence):
                budget -= self._plan_chunk(prefilling.popleft(), plan, budget)
            if not self._fits(sequence, budget) or not self._seat(sequence):
                break
            if sequence in self.paused:
                self._resume(sequence)
                budget -= self._plan_next(sequence, plan, budget)
                continue
            try:
                admission = self._acquire(sequence)
            except Exception as error:  # whatever it is, it concerns this sequence alone
                self._dequeue(sequence)
                sequence.status = SequenceStatus.FINISHED
                plan.rejected.append((sequence, error))
                continue
            if admission is Admission.FULL:
                break
            if admission is Admission.NO_SLOT:
                passed.append(sequence)
            elif admission is Admission.STARTED:
                self._start(sequence)
                budget -= self._plan_chunk(sequence, plan, budget)
                for other in passed:
                    other.num_passed += 1
        self._keep_slots_for(passed)
        return budget

    def _claimants(self) -> Collection[str]:
        """Tenants that could be given a seat now; nobody else need be ranked."""
        tenants = self.waiting.tenants
        if not tenants or len(self.running) < self.max_num_seqs or any(background(s) for s in self.running):
            return tenants
        return [t for t in tenants if self._is_behind(t)] if self._least_entitled() is not None else ()

    def _seat(self, sequence: Sequence) -> bool:
        """Whether there is a seat for it, if need be by pausing one that stands behind or whose tenant has too many."""
        if len(self.running) < self.max_num_seqs:
            return True
        victim: Sequence | None = max(self.running, key=self._merit_of_place)
        if victim is None or background(victim) <= background(sequence):
            may_claim = not background(sequence) and self._is_behind(sequence.request.tenant)
            victim = self._least_entitled() if may_claim else None
        if victim is None:
            return False
        self._leave(victim)
        victim.status = SequenceStatus.WAITING
        self.paused.append(victim)
        self.waiting.add(victim, again=True)
        return True

    def _acquire(self, sequence: Sequence) -> Admission:
        """Paused sequences keep their places as long as nobody needs them; a tenant's fair share goes further."""
        admission = self._resources.acquire(sequence)
        is_behind = self._is_behind(sequence.request.tenant)
        while self.paused and (admission is Admission.FULL or (admission is Admission.NO_SLOT and is_behind)):
            self._preempt(max(self.paused, key=self._merit_of_place))
            admission = self._resources.acquire(sequence)
        while admission is Admission.FULL and is_behind:
            victim = self._least_entitled()
            if victim is None:
                break
            self._preempt(victim)
            admission = self._resources.acquire(sequence)
        return admission

    def _keep_slots_for(self, passed: Iterable[Sequence]) -> None:
        """Others may pass a sequence that finds no slot as often as there are seats; then a slot is kept for it."""
        crowded = self._least_entitled() is not None
        starving = [
            s for s in passed if s.num_passed >= self.max_num_seqs or (crowded and self._is_behind(s.request.tenant))
        ]
        if starving or self._starving:
            self._starving = starving
            self._resources.keep_for(starving)

    def _start(self, sequence: Sequence) -> None:
        self._dequeue(sequence)
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)
        self._seats[sequence.request.tenant] += 1

    def _leave(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        self.running.remove(sequence)
        self._seats[tenant] -= 1
        if not self._seats[tenant]:
            del self._seats[tenant]

    def _resume(self, sequence: Sequence) -> None:
        self.paused.remove(sequence)
        self._start(sequence)

    # -- work -------------------------------------------------------------------------------------------------

    def _plan_next(self, sequence: Sequence, plan: Plan, budget: int) -> int:
        return self._plan_chunk(sequence, plan, budget) if sequence.is_prefill else self._plan_decode(sequence, plan)

    def _plan_decode(self, sequence: Sequence, plan: Plan) -> int:
        if not self._make_room(sequence):
            return 0
        plan.decodes.append(Work(sequence, 1, False, sequence.samples_next))
        return 1

    def _plan_chunk(self, sequence: Sequence, plan: Plan, budget: int) -> int:
        """Plan the sequence's next chunk if the whole of it fits; returns the tokens taken."""
        if sequence.status is not SequenceStatus.RUNNING:  # it has just made way for another
            return 0
        known = sequence.num_computed or self._resources.match(sequence)
        if known is None:
            return 0
        length = self._chunk_length(sequence, known)
        if length > budget:
            return 0
        if sequence.num_computed == 0:
            self._start_prompt(sequence, known)
        is_last = length == sequence.num_prompt_tokens - known
        samples = is_last and not sequence.output_token_ids and not sequence.needs_all_hidden
        plan.prefills.append(Work(sequence, length, True, samples))
        return length

    def _chunk_length(self, sequence: Sequence, position: int) -> int:
        """Tokens from here to the next line of the grid, or to the prompt's end."""
        return min(sequence.num_prompt_tokens - position, self.prefill_chunk - position % self.prefill_chunk)

    def _start_prompt(self, sequence: Sequence, num_known: int) -> None:
        self._resources.fetch(sequence, num_known)
        sequence.num_computed = num_known
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = num_known
            self.counters.charge(sequence.request.tenant, num_known * _CACHED_WEIGHT)

    def _fits(self, sequence: Sequence, budget: int) -> bool:
        """Whether the budget holds its first step. Replays and resumed decoding take one token at a time."""
        if not sequence.is_prefill:
            return budget > 0
        if self._chunk_length(sequence, sequence.num_computed) <= budget:
            return True
        if sequence.num_computed:
            return False
        known = self._resources.match(sequence)
        return known is None or self._chunk_length(sequence, known) <= budget

    def _charge(self, work: Work) -> None:
        """Count each token once: what is replayed after a preemption serves nobody."""
        sequence = work.sequence
        end = sequence.num_computed + work.num_tokens
        new = end - max(sequence.num_computed, sequence.num_charged)
        if new > 0:
            self.counters.charge(sequence.request.tenant, new if work.is_prefill else new * _DECODE_WEIGHT)
            sequence.num_charged = end

    # -- who goes first, who goes -----------------------------------------------------------------------------

    def _served(self, tenant: str) -> tuple[float, int]:
        """How much a tenant has had: tokens, and seats where they are equal, as they are for a newcomer."""
        return (self.counters.served(tenant), self._seats[tenant])

    def _merit(self, sequence: Sequence) -> tuple[int, float, int]:
        """The least goes first."""
        return (background(sequence), *self._served(sequence.request.tenant))

    def _merit_of_place(self, sequence: Sequence) -> tuple[int, float, int, int, float]:
        """The greatest gives way: the most served tenant's, of those its least urgent and last come."""
        return (*self._merit(sequence), -sequence.request.priority, sequence.arrival)

    def _is_behind(self, tenant: str) -> bool:
        """Whether another seat leaves it within its equal share of them."""
        num_active = len(self._active())
        return num_active <= self.max_num_seqs and self._seats[tenant] + 1 <= self.max_num_seqs / num_active

    def _least_entitled(self) -> Sequence | None:
        """What gives way to a tenant that is behind: the last of the tenant most above its share, if one is."""
        share = ceil(self.max_num_seqs / max(1, len(self._active())))
        tenant = max(self._seats, key=lambda t: (self._seats[t], self.counters.served(t)), default=None)
        if tenant is None or self._seats[tenant] <= share:
            return None
        return max((s for s in self.running if s.request.tenant == tenant), key=self._merit_of_place)

    def _make_room(self, sequence: Sequence) -> bool:
        """Extend a decoding sequence by a token, preempting the least deserving ones if the cache is full."""
        while not self._resources.extend(sequence, sequence.num_computed + 1):
            victim = max(self.paused or self.running, key=self._merit_of_place)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of its queue; it will be replayed from its tokens, bit for bit."""
        if sequence in self.paused:
            self.paused.remove(sequence)
        else:
            self._leave(sequence)
            self.waiting.add(sequence, again=True)
        self._resources.release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self._preempted_now = True
        if self._on_preempt is not None:
            self._on_preempt(sequence)

    def _dequeue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        if sequence in self._starving:
            self._starving.remove(sequence)
            self._resources.keep_for(self._starving)

    def _active(self) -> set[str]:
        return self.waiting.tenants | self._seats.keys()
