"""The stable hash behind a canary: fair shares, the same side always, and more percent only adds users."""

from __future__ import annotations

from itertools import pairwise
from math import sqrt

import pytest

from service.traffic_split import place_of

POSITION_OF_USER_7 = 0.5843084583364405
USERS = [f"user:{number}" for number in range(20_000)]


@pytest.mark.parametrize("percent", [0.5, 5.0, 20.0, 50.0, 99.0])
def test_a_share_is_what_it_says_within_the_binomial_bounds(percent: float) -> None:
    share = percent / 100
    chosen = sum(place_of("exp-a", user).within(percent) for user in USERS)
    assert abs(chosen - share * len(USERS)) < 4 * sqrt(share * (1 - share) * len(USERS))


def test_the_same_user_always_lands_on_the_same_side() -> None:
    assert place_of("exp-a", "user:7") == place_of("exp-a", "user:7")
    # The bits are fixed for good: a service that is restarted or replaced must not shuffle its users.
    assert place_of("exp-a", "user:7").position == pytest.approx(POSITION_OF_USER_7, abs=1e-12)


def test_raising_the_share_only_adds_users() -> None:
    places = [place_of("exp-a", user) for user in USERS]
    sides = [{place.unit for place in places if place.within(percent)} for percent in (0, 1, 5, 25, 80, 100)]
    assert sides[0] == set() and len(sides[-1]) == len(USERS)
    assert all(smaller < larger for smaller, larger in pairwise(sides))


def test_two_experiments_split_independently_and_name_users_differently() -> None:
    one, two = ([place_of(name, user) for user in USERS] for name in ("exp-a", "exp-b"))
    both = sum(a.within(50) and b.within(50) for a, b in zip(one, two, strict=True))
    assert abs(both - len(USERS) / 4) < 4 * sqrt(3 / 16 * len(USERS))
    assert not {place.unit for place in one} & {place.unit for place in two}
