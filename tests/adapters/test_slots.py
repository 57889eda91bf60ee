"""Slots: pinned while in use, least recently used out first, loads beside the loop, exact contents."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from adapters.errors import AdapterFormatError, NoFreeSlotError
from adapters.host_cache import HostCache
from adapters.lora import BatchedLoraLinear, Chunks, LoraPart, RowSlots, SlotRouting, plan_rows, routing
from adapters.lora_weights import BaseSignature, LinearShape, LoraSpec, LoraWeights
from adapters.prepared import PreparedAdapter, prepare
from adapters.slots import AdapterSlots
from tests.adapters.loras import random_lora

BASE = BaseSignature({"q": LinearShape(64, 32), "k": LinearShape(64, 16), "out": LinearShape(48, 64)}, "f")


class Recorder:
    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.evicted: list[str] = []
        self.failed: list[str] = []

    def adapter_loaded(self, tier: str, seconds: float) -> None:
        self.loaded.append(tier)

    def adapter_evicted(self, reason: str) -> None:
        self.evicted.append(reason)

    def adapter_verify_failed(self, reason: str) -> None:
        self.failed.append(reason)


class Fixture:
    def __init__(
        self,
        num_slots: int = 2,
        max_rank: int = 32,
        dtype: torch.dtype = torch.float32,
        max_bytes: int = 1 << 30,
    ) -> None:
        self.weights: dict[str, LoraWeights] = {}
        self.ready = threading.Event()
        self.recorder = Recorder()
        self.gate = threading.Event()
        self.gate.set()
        qk = nn.Linear(64, 48, bias=False).requires_grad_(False)
        out = nn.Linear(48, 64, bias=False).requires_grad_(False)
        self.qk = BatchedLoraLinear(qk, 64, (LoraPart("q", 32), LoraPart("k", 16)))
        self.out = BatchedLoraLinear(out, 48, (LoraPart("out", 64),))
        self.dtype = dtype
        self.sites = [self.qk, self.qk, self.out]
        self.host = HostCache(
            self.load, capacity=4, max_bytes=max_bytes, observer=self.recorder, on_ready=self.ready.set
        )
        self.slots = AdapterSlots(
            self.sites,
            num_slots=num_slots,
            max_rank=max_rank,
            dtype=dtype,
            device=torch.device("cpu"),
            host=self.host,
            observer=self.recorder,
        )

    def settle(self) -> None:
        """Until every load that was started has ended."""
        while self.host._loading:
            assert self.ready.wait(10)
            self.ready.clear()

    def fetch(self, *digests: str) -> None:
        """As the engine does it: before each step, while something changes."""
        self.slots.prefetch(digests)
        self.settle()
        self.slots.prefetch(digests)
        while self.slots.may_fetch_more:
            self.slots.prefetch(digests)

    def load(self, digest: str) -> PreparedAdapter:
        if digest != "quick":
            assert self.gate.wait(10)
        if digest not in self.weights:
            raise AdapterFormatError("flipped byte", check="digest")
        return prepare(self.weights[digest], self.sites, self.dtype, pinned=False)

    def add(self, digest: str, seed: int, **spec: object) -> None:
        self.weights[digest] = random_lora(BASE, seed=seed, spec=LoraSpec(**{"r": 8, **spec}))  # type: ignore[arg-type]

    def route(self, slots: list[int | None]) -> SlotRouting:
        return SlotRouting(self.slots.tables, Chunks([]), RowSlots(slots), RowSlots([]))

    def acquire(self, digest: str) -> int:
        """As the engine does it: ask, sleep until something arrived, ask again."""
        while (slot := self.slots.acquire(digest)) is None:
            assert self.ready.wait(10)
            self.ready.clear()
        return slot


@pytest.fixture
def fixture() -> Iterator[Fixture]:
    made = Fixture()
    yield made
    made.host.close()


def expected(site: BatchedLoraLinear, weights: LoraWeights | None, x: torch.Tensor) -> torch.Tensor:
    """The slow reference: one row, part by part."""
    y = site.base(x)
    pieces = list(y.split([p.out_features for p in site.parts], dim=-1))
    for index, part in enumerate(site.parts):
        if weights is not None and (pair := weights.modules.get(part.name)):
            pieces[index] = pieces[index] + x @ pair.a.T @ pair.b.T * pair.scaling
    return torch.cat(pieces, dim=-1)


def test_rows_of_any_mix_get_their_own_adapter(fixture: Fixture) -> None:
    fixture.add("a", 1, target_modules=("q", "out"), r=4)
    fixture.add("b", 2, r=20, use_rslora=True)
    slot = {None: None, "a": fixture.acquire("a"), "b": fixture.acquire("b")}
    x = torch.randn(7, 64)
    mixes: list[list[str | None]] = [
        ["a"] * 7,
        ["a", "b", "a", "b", "a", "b", "a"],
        [None] * 7,
        ["b", None, "b", "b", None, "a", "a"],
    ]
    for mix in mixes:
        with torch.no_grad(), routing(fixture.route([slot[m] for m in mix])):
            got = fixture.qk(x)
        for row, name in enumerate(mix):
            want = expected(fixture.qk, fixture.weights[name] if name else None, x[row : row + 1])[0]
            torch.testing.assert_close(got[row], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_every_mix(dtype: torch.dtype) -> None:
    fixture = Fixture(num_slots=4, dtype=dtype)
    for seed, name in enumerate("abcd"):
        fixture.add(name, seed)
    slots: list[int | None] = [fixture.acquire(name) for name in "abcd"]
    fixture.host.close()
    x = torch.randn(48, 64, dtype=dtype)
    mixes = {"identical": slots[:1] * 48, "even": sorted(slots * 12), "distinct": slots * 12}  # type: ignore[type-var]
    mixes["skewed"] = [slots[0]] * 29 + [None] * 3 + [slots[1]] * 14 + [slots[2], slots[3]]
    for mix in mixes.values():
        crowd = fixture.route(mix).apply(fixture.qk, x, torch.zeros(48, 48, dtype=dtype))
        for row, slot in enumerate(mix):
            alone = fixture.route([slot]).apply(fixture.qk, x[row : row + 1], torch.zeros(1, 48, dtype=dtype))
            assert torch.equal(alone[0], crowd[row])


def test_a_slot_in_use_is_never_loaded_over(fixture: Fixture) -> None:
    for index, name in enumerate("abc"):
        fixture.add(name, index)
    fixture.acquire("a")
    fixture.acquire("b")
    with pytest.raises(NoFreeSlotError):
        fixture.acquire("c")
    fixture.slots.release("a")
    assert fixture.acquire("c") is not None
    assert set(fixture.slots.resident()) == {"b", "c"}
    assert fixture.recorder.evicted == ["capacity"]


def test_the_least_recently_used_goes_first(fixture: Fixture) -> None:
    for index, name in enumerate("abc"):
        fixture.add(name, index)
    for name in ("a", "b", "a"):
        fixture.acquire(name)
        fixture.slots.release(name)
    fixture.acquire("c")
    assert fixture.slots.resident() == ("a", "c")


def test_a_deleted_adapter_leaves_with_its_last_reference(fixture: Fixture) -> None:
    fixture.add("a", 1)
    fixture.acquire("a")
    fixture.slots.retire("a")
    assert fixture.slots.resident() == ("a",)
    fixture.slots.release("a")
    assert fixture.slots.resident() == ()
    assert fixture.host.digests() == ()


def test_a_reused_slot_keeps_nothing_of_the_adapter_before(fixture: Fixture) -> None:
    fixture.add("wide", 1, r=16)
    fixture.add("narrow", 2, r=4, target_modules=("k",))
    fixture.add("other", 3)
    fixture.acquire("other")
    fixture.acquire("wide")
    fixture.slots.release("wide")
    slot = fixture.acquire("narrow")
    x = torch.randn(1, 64)
    with torch.no_grad(), routing(fixture.route([slot])):
        got, out = fixture.qk(x), fixture.out(torch.ones(1, 48))
    torch.testing.assert_close(got, expected(fixture.qk, fixture.weights["narrow"], x), atol=1e-5, rtol=1e-4)
    assert torch.equal(out, fixture.out.base(torch.ones(1, 48)))


def test_growing_the_tables_for_a_wider_adapter_keeps_those_inside(fixture: Fixture) -> None:
    fixture.add("a", 1, r=8)
    fixture.add("wide", 2, r=30)
    slot = fixture.acquire("a")
    fixture.acquire("wide")
    x = torch.randn(1, 64)
    with torch.no_grad(), routing(fixture.route([slot])):
        torch.testing.assert_close(fixture.qk(x), expected(fixture.qk, fixture.weights["a"], x), atol=1e-5, rtol=1e-4)


def test_a_load_that_fails_is_told_once_and_tried_again(fixture: Fixture) -> None:
    with pytest.raises(AdapterFormatError, match="flipped"):
        fixture.acquire("late")
    assert fixture.recorder.failed == ["digest"]
    fixture.add("late", 1)
    assert fixture.acquire("late") is not None


def test_a_rank_above_the_limit_is_refused(fixture: Fixture) -> None:
    fixture.add("huge", 1, r=33)
    with pytest.raises(AdapterFormatError) as refusal:
        fixture.acquire("huge")
    assert refusal.value.check == "rank"
    assert fixture.slots.resident() == ()


def test_slots_side_by_side_with_equally_many_rows_share_a_matmul() -> None:
    runs = plan_rows([None, 0, 0, 1, 1, 2, 5, None, 5, 5])
    assert [(r.start, r.stop, list(r.slots)) for r in runs] == [(1, 5, [0, 1]), (5, 6, [2]), (6, 7, [5]), (8, 10, [5])]


def test_what_waits_is_fetched_ahead_but_never_over_what_is_wanted_sooner(fixture: Fixture) -> None:
    for index, name in enumerate("abcd"):
        fixture.add(name, index)
    for name in "ab":
        fixture.acquire(name)
        fixture.slots.release(name)
    fixture.fetch("b", "c", "a", "d")
    assert set(fixture.slots.resident()) == {"b", "c"}, "'a' makes room for 'c', which is wanted sooner"
    fixture.fetch("b", "c", "a", "d")
    assert set(fixture.slots.resident()) == {"b", "c"}
    fixture.acquire("b")
    fixture.acquire("c")
    fixture.fetch("d", "a")
    assert set(fixture.slots.resident()) == {"b", "c"}, "both are pinned"
    fixture.slots.release("c")
    assert fixture.acquire("d") is not None, "what starts now goes before what is only wanted"


def test_a_slot_kept_for_one_that_waited_takes_no_new_sequence_until_it_has_changed_hands(fixture: Fixture) -> None:
    for index, name in enumerate("abc"):
        fixture.add(name, index)
    for name in "aab":
        fixture.acquire(name)
    with pytest.raises(NoFreeSlotError):
        fixture.acquire("c")
    fixture.slots.keep_for(["c"])
    with pytest.raises(NoFreeSlotError):
        fixture.slots.acquire("b")  # fewest references: it is empty soonest
    fixture.acquire("a")
    fixture.slots.release("b")
    with pytest.raises(NoFreeSlotError):
        fixture.slots.acquire("b")
    fixture.acquire("c")
    fixture.slots.keep_for([])
    assert set(fixture.slots.resident()) == {"a", "c"}


def test_a_slot_is_open_again_when_nobody_waits_for_it_any_more(fixture: Fixture) -> None:
    for index, name in enumerate("ab"):
        fixture.add(name, index)
        fixture.acquire(name)
    fixture.slots.keep_for(["gone"])
    fixture.slots.keep_for([])
    assert fixture.acquire("a") is not None and fixture.acquire("b") is not None


def test_host_memory_is_bounded_by_bytes_and_keeps_what_is_wanted_soonest() -> None:
    one = prepare(random_lora(BASE, seed=1), Fixture().sites, torch.float32, pinned=False).num_bytes
    fixture = Fixture(num_slots=1, max_bytes=2 * one)
    for index, name in enumerate("abcd"):
        fixture.add(name, index)
        fixture.acquire(name)
        fixture.slots.release(name)
    assert fixture.host.digests() == ("c", "d")
    fixture.host.prefetch(["c", "a", "b"])
    fixture.settle()
    assert fixture.host.digests() == ("c", "a"), "no room is made for 'b': it would push out what is wanted before it"
    fixture.host.close()


def test_an_adapter_larger_than_the_bound_is_served_all_the_same() -> None:
    fixture = Fixture(max_bytes=1)
    for name in "ab":
        fixture.add(name, 1)
        assert fixture.acquire(name) is not None
    assert fixture.host.digests() == ("b",)
    fixture.host.close()


def test_asking_for_what_lies_beyond_the_next_requests_loads_nothing(fixture: Fixture) -> None:
    """Every waiting request asked for its adapter, and 24 adapters chased each other through a cache of 9."""
    for index, name in enumerate("abcdef"):
        fixture.add(name, index)
    for _ in range(5):
        fixture.host.prefetch("abcdef")
        fixture.settle()
        assert [fixture.host.get(name) is not None for name in "abcdef"] == [True] * 4 + [False] * 2
    fixture.settle()
    assert fixture.recorder.loaded == ["host"] * 4


def test_one_adapter_is_loaded_once_however_many_ask(fixture: Fixture) -> None:
    fixture.add("a", 1)
    fixture.gate.clear()
    assert [fixture.host.get("a") for _ in range(5)] == [None] * 5
    fixture.host.prefetch(["a"])
    fixture.gate.set()
    fixture.settle()
    assert fixture.host.get("a") is not None
    assert fixture.recorder.loaded == ["host"]


def test_a_slow_load_holds_up_no_other(fixture: Fixture) -> None:
    fixture.add("slow", 1)
    fixture.add("quick", 2)
    fixture.gate.clear()
    assert fixture.host.get("slow") is None
    assert fixture.acquire("quick") is not None
    fixture.gate.set()
    assert fixture.acquire("slow") is not None


def test_packing_beside_the_engine_gives_the_same_table_as_the_plain_formula(fixture: Fixture) -> None:
    fixture.add("a", 1, r=12, target_modules=("k",), lora_alpha=5.0)
    fixture.add("b", 2, r=20)
    slots = {name: fixture.acquire(name) for name in "ab"}
    table = fixture.slots.tables[fixture.qk]
    for name, slot in slots.items():
        a, b = torch.zeros(2, table.r, 64), [torch.zeros(table.r, 32), torch.zeros(table.r, 16)]
        for place, part in enumerate(("q", "k")):
            if pair := fixture.weights[name].modules.get(part):
                rank = pair.a.shape[0]
                a[place, :rank] = pair.a
                b[place][:rank] = pair.b.T * pair.scaling
        assert torch.equal(table.a[slot].view(2, table.r, 64), a)
        assert all(torch.equal(bank.b[slot, 0], b[bank.parts[0]]) for bank in table.banks)
