"""Scheduling without tensors: token-granular joining, the chunk grid, preemption, fairness, priorities."""

from __future__ import annotations

from adapters.errors import AdapterNotFoundError
from service.engine.scheduler import Admission, Plan, Scheduler
from service.engine.sequence import GenerationRequest, SamplingParams, Sequence, SequenceStatus


class Cache:
    """A budget of tokens; adapters named 'slow' arrive later, 'gone' does not exist."""

    def __init__(self, tokens: int) -> None:
        self.free = tokens
        self.held: dict[Sequence, int] = {}
        self.arrived: set[str] = set()

    def acquire(self, sequence: Sequence) -> Admission:
        adapter = sequence.request.adapter
        if adapter == "gone":
            raise AdapterNotFoundError("no such adapter")
        if adapter == "slow" and adapter not in self.arrived:
            return Admission.LATER
        if sequence.num_tokens > self.free:
            return Admission.FULL
        self.held[sequence] = sequence.num_prompt_tokens
        self.free -= sequence.num_prompt_tokens
        return Admission.STARTED

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        more = max(0, num_tokens - self.held[sequence])
        if more > self.free:
            return False
        self.held[sequence] += more
        self.free -= more
        return True

    def release(self, sequence: Sequence) -> None:
        self.free += self.held.pop(sequence)


def sequence(
    name: str, prompt: int = 4, tenant: str = "t", adapter: str | None = None, priority: int = 0, arrival: float = 0
) -> Sequence:
    request = GenerationRequest(name, tuple(range(1, prompt + 1)), SamplingParams(), tenant, adapter, priority)
    return Sequence(request, max_tokens=100, arrival=arrival)


def scheduler(cache: Cache, *, max_num_seqs: int = 4, max_num_batched_tokens: int = 20) -> Scheduler:
    return Scheduler(cache, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, prefill_chunk=8)


def advance(plan: Plan) -> list[tuple[str, int]]:
    """Pretend that the plan was computed; returns (request, tokens) of each work."""
    for work in plan.work:
        work.sequence.num_computed += work.num_tokens
        if work.samples:
            work.sequence.output_token_ids.append(7)
    return [(w.sequence.request.request_id, w.num_tokens) for w in plan.work]


def test_a_prompt_is_prefilled_on_the_chunk_grid_beside_decodes() -> None:
    s = scheduler(Cache(1000))
    s.add(sequence("a", prompt=3))
    assert advance(s.schedule()) == [("a", 3)]
    s.add(sequence("b", prompt=18))
    steps = [advance(s.schedule()) for _ in range(4)]
    assert steps == [[("b", 8), ("a", 1)], [("b", 8), ("a", 1)], [("b", 2), ("a", 1)], [("a", 1), ("b", 1)]]


def test_a_chunk_that_does_not_fit_waits_whole() -> None:
    s = scheduler(Cache(1000), max_num_batched_tokens=12)
    for name in "abc":
        s.add(sequence(name, prompt=8))
    assert [advance(s.schedule()) for _ in range(3)] == [
        [("a", 8)],
        [("b", 8), ("a", 1)],
        [("c", 8), ("a", 1), ("b", 1)],
    ]


def test_seats_are_limited_and_given_on() -> None:
    s = scheduler(Cache(1000), max_num_seqs=2)
    first, second, third = (sequence(n, prompt=2) for n in "abc")
    for one in (first, second, third):
        s.add(one)
    advance(s.schedule())
    assert s.num_waiting == 1
    s.remove(first)
    assert advance(s.schedule()) == [("c", 2), ("b", 1)]


def test_a_full_cache_preempts_the_last_come_and_replays_it_token_by_token() -> None:
    cache = Cache(11)
    s = scheduler(cache)
    old, new = sequence("old", arrival=1), sequence("new", arrival=2)
    s.add(old)
    s.add(new)
    for _ in range(2):
        advance(s.schedule())
    assert len(new.output_token_ids) == 2
    advance(s.schedule())
    advance(s.schedule())
    assert new.status is SequenceStatus.WAITING and new.num_computed == 0 and old.status is SequenceStatus.RUNNING
    outputs = len(new.output_token_ids)
    s.remove(old)
    assert advance(s.schedule()) == [("new", 4)]
    assert len(new.output_token_ids) == outputs, "replaying the prompt must not sample again"
    for _ in range(outputs):
        assert advance(s.schedule()) == [("new", 1)]
    assert len(new.output_token_ids) == outputs + 1
    s.remove(new)
    assert cache.free == 11 and not s.has_work


def test_a_request_whose_adapter_is_arriving_holds_nobody_up() -> None:
    cache = Cache(1000)
    s = scheduler(cache)
    s.add(sequence("slow", adapter="slow"))
    s.add(sequence("quick"))
    assert advance(s.schedule()) == [("quick", 4)]
    cache.arrived.add("slow")
    assert advance(s.schedule()) == [("slow", 4), ("quick", 1)]


def test_a_request_whose_adapter_is_gone_is_rejected_alone() -> None:
    s = scheduler(Cache(1000))
    s.add(sequence("gone", adapter="gone"))
    s.add(sequence("fine"))
    plan = s.schedule()
    assert [(q.request.request_id, type(e)) for q, e in plan.rejected] == [("gone", AdapterNotFoundError)]
    assert advance(plan) == [("fine", 4)]


def test_a_flooding_tenant_does_not_keep_the_others_waiting() -> None:
    s = scheduler(Cache(1000), max_num_seqs=1, max_num_batched_tokens=100)
    for index in range(20):
        s.add(sequence(f"flood-{index}", tenant="flood", arrival=index))
    s.add(sequence("single", tenant="small", arrival=100))
    order = []
    while s.has_work:
        done = advance(s.schedule())[0][0]
        order.append(done)
        s.remove(s.running[0])
    assert order.index("single") <= 1


def test_higher_priority_goes_first_and_is_preempted_last() -> None:
    s = scheduler(Cache(9), max_num_seqs=2)
    s.add(sequence("low", arrival=1))
    s.add(sequence("high", priority=5, arrival=2))
    assert advance(s.schedule()) == [("high", 4), ("low", 4)]
    assert advance(s.schedule()) == [("high", 1)]


def test_a_tenant_returning_from_idling_has_no_credit() -> None:
    s = scheduler(Cache(1000))
    s.add(sequence("busy", tenant="busy", prompt=8))
    for _ in range(50):
        advance(s.schedule())
    s.add(sequence("back", tenant="idle"))
    assert s.counters.served("idle") == s.counters.served("busy")
