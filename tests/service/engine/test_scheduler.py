"""Scheduling without tensors: token-granular joining, the chunk grid, preemption, fairness, priorities."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

from adapters.errors import AdapterNotFoundError
from service.engine.plan import Plan
from service.engine.scheduler import Admission, Scheduler
from service.engine.sequence import GenerationRequest, SamplingParams, Sequence, SequenceStatus


class Cache:
    """A budget of tokens and slots; adapters named 'slow' arrive later, 'gone' does not exist."""

    def __init__(self, tokens: int, num_slots: int = 100) -> None:
        self.free = tokens
        self.num_slots = num_slots
        self.closing: str | None = None
        self.held: dict[Sequence, int] = {}
        self.arrived: set[str] = set()
        self.known: dict[str, int | None] = {}
        self.fetched: list[tuple[str, int]] = []

    def acquire(self, sequence: Sequence) -> Admission:
        adapter = sequence.request.adapter
        if adapter == "gone":
            raise AdapterNotFoundError("no such adapter")
        if adapter == "slow" and adapter not in self.arrived:
            return Admission.LATER
        if sequence.num_tokens > self.free:
            return Admission.FULL
        pinned = {held.request.adapter for held in self.held} - {None}
        if adapter is not None and adapter not in pinned and len(pinned) >= self.num_slots:
            return Admission.NO_SLOT
        if self.closing is not None and adapter == self.closing:
            return Admission.NO_SLOT
        self.held[sequence] = sequence.num_prompt_tokens
        self.free -= sequence.num_prompt_tokens
        return Admission.STARTED

    def match(self, sequence: Sequence) -> int | None:
        """What the test says is known of the prompt."""
        return self.known.get(sequence.request.request_id, 0)

    def fetch(self, sequence: Sequence, num_tokens: int) -> None:
        assert sequence in self.held, "there is no row to copy to"
        self.fetched.append((sequence.request.request_id, num_tokens))

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        more = max(0, num_tokens - self.held[sequence])
        if more > self.free:
            return False
        self.held[sequence] += more
        self.free -= more
        return True

    def release(self, sequence: Sequence) -> None:
        self.free += self.held.pop(sequence)

    def keep_for(self, sequences: Iterable[Sequence]) -> None:
        """As the slots do it: the adapter with the fewest sequences takes no further ones."""
        used = Counter(held.request.adapter for held in self.held if held.request.adapter is not None)
        self.closing = min(used, key=lambda adapter: used[adapter]) if list(sequences) and used else None


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


def finish(s: Scheduler, *names: str) -> None:
    for one in [q for q in (*s.running, *s.waiting) if q.request.request_id in names]:
        s.remove(one)


def names(sequences: Iterable[Sequence]) -> list[str]:
    return [one.request.request_id for one in sequences]


def flooded(cache: Cache, num: int = 10, **sizes: int) -> Scheduler:
    """Four seats, all taken by one tenant with more waiting."""
    s = scheduler(cache, **{"max_num_batched_tokens": 40, **sizes})
    for index in range(num):
        s.add(sequence(f"flood-{index}", tenant="flood", arrival=index))
    advance(s.schedule())
    assert len(s.running) == 4
    return s


def test_a_newcomer_gets_a_seat_at_once_from_the_flooders_youngest_which_loses_nothing() -> None:
    cache = Cache(1000)
    s = flooded(cache)
    s.add(sequence("new", tenant="small", arrival=100))
    assert advance(s.schedule())[0] == ("new", 4)
    assert names(s.paused) == ["flood-3"] and s.paused[0] in cache.held, "it keeps its place"
    computed = s.paused[0].num_computed
    finish(s, "new")
    assert ("flood-3", 1) in advance(s.schedule()), "it goes on before those that have never run"
    assert s.running[-1].num_computed == computed + 1 and s.running[-1].num_preemptions == 0


def test_seats_are_taken_up_to_an_equal_share_and_never_back() -> None:
    s = flooded(Cache(1000))
    for index in range(4):
        s.add(sequence(f"small-{index}", tenant="small", arrival=100 + index))
    seated = []
    for _ in range(50):
        advance(s.schedule())
        seated.append(sorted(names(s.running)))
    assert seated == [["flood-0", "flood-1", "small-0", "small-1"]] * 50


def test_more_tenants_than_seats_take_none_from_each_other() -> None:
    s = scheduler(Cache(1000), max_num_seqs=2)
    for index in range(5):
        s.add(sequence(str(index), tenant=str(index), arrival=index))
    for _ in range(20):
        advance(s.schedule())
        assert names(s.running) == ["0", "1"] and not s.paused


def test_a_full_cache_makes_room_for_a_newcomer_at_the_flooders_expense_alone() -> None:
    cache = Cache(40)
    s = flooded(cache, max_num_batched_tokens=20)
    while cache.free >= 4:
        advance(s.schedule())
    s.add(sequence("new", tenant="small", arrival=100))
    assert ("new", 4) in advance(s.schedule()) + advance(s.schedule()), "the first may only make room for who runs"
    assert {q.request.tenant for q in s.waiting} == {"flood"}
    while s.has_work:  # and everybody comes to an end
        advance(s.schedule())
        finish(s, *(q.request.request_id for q in list(s.running) if len(q.output_token_ids) >= 3))
    assert cache.free == 40


def test_paused_sequences_give_their_cache_up_rather_than_stop_the_service() -> None:
    cache = Cache(32)
    s = scheduler(cache, max_num_batched_tokens=40)
    for index in range(4):
        s.add(sequence(f"flood-{index}", tenant="flood", arrival=index))
    advance(s.schedule())
    s.add(sequence("new", tenant="small", prompt=8, arrival=100))
    advance(s.schedule())
    assert names(s.paused) == ["flood-3"]
    for _ in range(100):
        advance(s.schedule())
        finish(s, *(q.request.request_id for q in list(s.running) if len(q.output_token_ids) >= 6))
    assert not s.has_work and cache.free == 32


def test_the_newcomers_prompt_is_computed_before_the_flooders_next_chunks() -> None:
    s = scheduler(Cache(1000), max_num_batched_tokens=16)
    for index in range(3):
        s.add(sequence(f"flood-{index}", tenant="flood", prompt=80, arrival=index))
    advance(s.schedule())
    s.add(sequence("new", tenant="small", arrival=100))
    assert advance(s.schedule())[0] == ("new", 4)


def test_a_priority_orders_the_own_tenants_requests_only() -> None:
    s = scheduler(Cache(1000), max_num_seqs=1)
    s.add(sequence("running", tenant="a"))
    advance(s.schedule())
    s.add(sequence("urgent", tenant="a", priority=1000, arrival=2))
    s.add(sequence("plain", tenant="a", arrival=1))
    s.add(sequence("other", tenant="b", arrival=3))
    advance(s.schedule())
    finish(s, "running")
    order = []
    while s.has_work:
        advance(s.schedule())
        order += names(s.running)
        finish(s, order[-1])
    assert order == ["other", "urgent", "plain"]


def test_a_negative_priority_stands_behind_everybody_and_gives_its_seat_up() -> None:
    s = scheduler(Cache(1000), max_num_seqs=1)
    s.add(sequence("evaluation", tenant="a", priority=-10))
    advance(s.schedule())
    for _ in range(20):
        advance(s.schedule())
    s.add(sequence("mine", tenant="a", arrival=1))
    assert ("mine", 4) in advance(s.schedule()) and names(s.paused) == ["evaluation"]
    s.add(sequence("theirs", tenant="b", arrival=2))
    finish(s, "mine")
    assert advance(s.schedule()) == [("theirs", 4)]
    finish(s, "theirs")
    assert advance(s.schedule()) == [("evaluation", 1)]


def test_a_request_without_a_slot_is_passed_over_only_so_often() -> None:
    s = scheduler(Cache(1000, num_slots=1), max_num_seqs=2)
    s.add(sequence("first", adapter="popular"))
    advance(s.schedule())
    s.add(sequence("lonely", adapter="rare", arrival=1))
    started = 0
    while True:
        started += 1
        assert started <= 10, "it starves"
        s.add(sequence(f"next-{started}", adapter="popular", arrival=1 + started))
        advance(s.schedule())
        if "lonely" in names(s.running):
            break
        finish(s, names(s.running)[0])
    assert 2 <= started <= 6, "those whose adapter is there go first, but only as often as there are seats"


def test_replaying_after_a_preemption_is_not_charged_again() -> None:
    cache = Cache(11)
    s = scheduler(cache)
    old, new = sequence("old", arrival=1), sequence("new", arrival=2)
    s.add(old)
    s.add(new)
    while new.num_preemptions == 0:
        advance(s.schedule())
    s.remove(old)
    charged = s.counters.served("t")
    for _ in range(new.num_tokens - new.num_prompt_tokens):
        advance(s.schedule())
    assert s.counters.served("t") == charged


def test_upcoming_adapters_alternate_between_tenants_as_their_requests_will() -> None:
    s = scheduler(Cache(1000))
    for index in range(3):
        s.add(sequence(f"a{index}", tenant="a", adapter=f"a{index}", arrival=index))
    for index in range(2):
        s.add(sequence(f"b{index}", tenant="b", adapter=f"b{index}", arrival=10 + index))
    assert s.upcoming(10) == ["a0", "b0", "a1", "b1", "a2"]
    assert s.upcoming(2) == ["a0", "b0"]


def test_a_random_life_leaves_nothing_behind() -> None:
    rng = random.Random(7)
    cache = Cache(60, num_slots=2)
    s = scheduler(cache, max_num_seqs=3, max_num_batched_tokens=16)
    alive: list[Sequence] = []
    for step in range(3000):
        if step < 2500 and rng.random() < 0.3:
            adapter = rng.choice([None, "x", "y", "z"])
            length = rng.randrange(1, 20)
            cache.known[str(step)] = rng.choice([0, length // 2])
            one = sequence(str(step), length, rng.choice("abcd"), adapter, rng.choice([0, 0, 0, 3, -5]), step)
            alive.append(one)
            s.add(one)
        plan = s.schedule()
        assert len(s.running) <= 3 and sum(w.num_tokens for w in plan.work) <= 16
        assert plan.work or not s.has_work, "something could have run"
        assert len({w.sequence for w in plan.work}) == len(plan.work)
        advance(plan)
        assert set(cache.held) == {*s.running, *s.paused}
        for one in [q for q in alive if len(q.output_token_ids) >= 6 or rng.random() < 0.005]:
            s.remove(one)
            alive.remove(one)
    assert not s.has_work and not s.paused and cache.free == 60 and s.waiting.adapters() == ()


def test_a_prompt_starts_behind_what_is_known_of_it_and_stays_on_the_grid() -> None:
    cache = Cache(1000)
    cache.known["a"] = 4
    s = scheduler(cache, max_num_batched_tokens=12)
    s.add(sequence("a", prompt=18))
    assert [advance(s.schedule()) for _ in range(3)] == [[("a", 4)], [("a", 8)], [("a", 2)]]
    assert cache.fetched == [("a", 4)]
    assert 14 < s.counters.served("t") < 18, "a copied token counts less than a computed one"


def test_only_computed_tokens_are_taken_from_the_budget() -> None:
    cache = Cache(1000)
    cache.known["b"] = 4
    s = scheduler(cache, max_num_batched_tokens=12)
    s.add(sequence("a", prompt=8))
    s.add(sequence("b", prompt=8))
    assert advance(s.schedule()) == [("a", 8), ("b", 4)]


def test_a_prompt_that_another_is_computing_waits_in_its_seat_and_holds_nobody_up() -> None:
    cache = Cache(1000)
    cache.known["held"] = None
    s = scheduler(cache)
    for name in ("held", "free"):
        s.add(sequence(name, prompt=8, arrival=name == "free"))
    assert advance(s.schedule()) == [("free", 8)]
    assert advance(s.schedule()) == [("free", 1)]
    cache.known["held"] = 4
    assert advance(s.schedule()) == [("held", 4), ("free", 1)]


def test_what_is_known_is_asked_again_when_a_preempted_sequence_comes_back() -> None:
    cache = Cache(9)
    s = scheduler(cache)
    for arrival, name in enumerate(("old", "new")):
        s.add(sequence(name, arrival=arrival))
    while all(one.num_preemptions == 0 for one in [*s.running, *s.waiting]):
        advance(s.schedule())
    old, [new] = s.running[0], list(s.waiting)
    cache.known["new"] = 2
    s.remove(old)
    assert advance(s.schedule()) == [("new", 2)] and new.num_cached_tokens == 0
