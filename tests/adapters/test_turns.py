"""Whose turn it is: groups within a budget, the least served first, patience with those who are about to come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from adapters.turns import Traveller, Turns, Wish
from tests.adapters.company import at_once


class Watch:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _ready(turns: Turns, *wishes: Wish) -> list[Wish]:
    """Whom `turns` would let go, with these waiting."""
    with turns.changed:
        turns._waiting.extend(wishes)
        group = turns._choose()
        turns._waiting.clear()
    return group


def _wish(num_tokens: int = 10, *, served: float = 0, max_tokens: int = 100, joins: bool = True) -> Wish:
    traveller = Traveller()
    traveller.served = served
    return Wish(traveller, num_tokens, max_tokens, joins)


def _travelled(turns: Turns, *wishes: Wish) -> None:
    """They were on the way together and are back."""
    with turns.changed:
        turns._waiting.extend(wishes)
        turns._set_off(list(wishes))
    turns.opened()
    turns.release()
    with turns.changed:
        turns.closed(seconds=1.0)


def test_all_who_wait_go_together_within_the_largest_budget_of_them() -> None:
    a, b, c, d = _wish(40), _wish(30, max_tokens=90), _wish(60), _wish(20)
    assert _ready(Turns(), a, b, c, d) == [a, b, d]
    assert _ready(Turns(together=False), a, b, c, d) == [a]


def test_memory_bounds_a_group_more_tightly_but_nobody_stays_behind_for_good() -> None:
    turns = Turns()
    turns.max_tokens = 60
    assert [wish.num_tokens for wish in _ready(turns, _wish(40), _wish(30), _wish(20))] == [40, 20]
    assert [wish.num_tokens for wish in _ready(turns, _wish(80), _wish(30))] == [80]


def test_the_least_served_goes_first_and_nobody_gets_more_than_a_budget_ahead_of_it() -> None:
    behind, close, ahead = _wish(10, served=5), _wish(10, served=90), _wish(10, served=200)
    assert _ready(Turns(), ahead, close, behind) == [behind, close]
    assert _ready(Turns(), ahead) == [ahead]


def test_work_that_stands_alone_waits_for_its_turn_and_then_does() -> None:
    alone = _wish(joins=False, served=3)
    early, late = _wish(served=1), _wish(served=5)
    assert _ready(Turns(), alone, early, late) == [early, late]
    assert _ready(Turns(), alone, late) == [alone]


def test_while_a_group_is_open_nobody_sets_off_but_who_stands_alone() -> None:
    turns, joining, alone = Turns(), _wish(), _wish(joins=False, served=50)
    turns.opened()
    assert _ready(turns, joining) == []
    assert _ready(turns, joining, alone) == [alone]
    with turns.changed:
        turns.closed(seconds=0.1)
    assert _ready(turns, joining) == [joining]


def test_who_travels_regularly_is_waited_for_and_when_missed_only_once() -> None:
    watch = Watch()
    turns = Turns(clock=watch)
    here, away = _wish(), _wish()
    _travelled(turns, here, away)
    assert _ready(turns, here) == []
    assert _ready(turns, here, away) == [here, away]
    watch.now += 0.2
    assert _ready(turns, here) == [here]
    _travelled(turns, here)
    assert _ready(turns, here) == [here]


def test_nobody_waits_for_those_who_would_find_no_room() -> None:
    turns = Turns(clock=Watch())
    large, away = _wish(95), _wish(10)
    _travelled(turns, large, away)
    assert _ready(turns, large) == [large]


def test_nobody_waits_for_one_who_has_left() -> None:
    turns = Turns(clock=Watch())
    here, away = _wish(), _wish()
    _travelled(turns, here, away)
    turns.leave(away.traveller)
    assert _ready(turns, here) == [here]


def test_who_is_kept_apart_goes_alone() -> None:
    turns, apart, other = Turns(), _wish(served=1), _wish(served=2)
    apart.traveller.alone = True
    assert _ready(turns, apart, other) == [apart]
    apart.traveller.served = 3
    assert _ready(turns, apart, other) == [other]


def test_a_newcomer_has_no_credit() -> None:
    turns = Turns(clock=Watch())
    old, new = _wish(), Traveller()
    old.traveller.served = 500
    _travelled(turns, old)
    with turns.changed:
        turns._lift(new)
    assert new.served == old.traveller.served > 500


def test_one_alone_never_waits() -> None:
    turns, traveller = Turns(), Traveller()
    started = time.monotonic()
    for _ in range(100):
        group = turns.wait_for(Wish(traveller, 10, 100, joins=True))
        assert group is not None
        turns.opened()
        turns.release()
        with turns.changed:
            turns.closed(seconds=10.0)
    assert time.monotonic() - started < 1.0


def test_the_device_is_never_taken_twice_and_everybody_gets_his_share_of_it() -> None:
    turns, inside = Turns(), threading.Lock()
    served = [0] * 4
    over = threading.Event()

    def worker(index: int) -> Callable[[], None]:
        def task() -> None:
            traveller, num_tokens = Traveller(), 10 * (index + 1)
            while not over.is_set():
                with turns.alone(traveller, num_tokens):
                    assert inside.acquire(blocking=False)
                    time.sleep(0.0005)
                    served[index] += num_tokens
                    inside.release()
                if max(served) >= 1500:
                    over.set()

        return task

    assert at_once([worker(index) for index in range(4)]) == [None] * 4
    assert min(served) > 0.5 * max(served)
