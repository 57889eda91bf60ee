"""Who computes on the device next: one at a time, or several runs together, each its fair share of tokens.

Work of one kind stands alone; work of the other kind (`joins`) travels in groups: everybody who waits goes at once,
within a budget of tokens. A group is *open* until its work is finished by all; meanwhile nobody else sets off, so
whoever comes later travels with them the next time. Knows threads and counts of tokens, nothing of tensors.

Fairness is that of the engine's scheduler: a counter of tokens for each run, who was served least goes first, and
nobody gets further ahead of somebody who wants his turn than one budget.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SHORTEST_PATIENCE, LONGEST_PATIENCE = 0.002, 0.1
PATIENCE_SHARE = 0.5


class Traveller:
    """One run's account; it belongs to its `Turns`."""

    def __init__(self) -> None:
        self.served = 0.0
        self.last_tokens = 0
        self.alone = False
        """It is not to travel with others for now."""


@dataclass(eq=False)
class Wish:
    """Somebody waits for a turn. `max_tokens` is what its group may hold."""

    traveller: Traveller
    num_tokens: int
    max_tokens: int
    joins: bool
    done: bool = field(default=False, init=False)


class Turns:
    """`together` False: everybody goes alone, still in fair turns."""

    def __init__(self, *, together: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.together = together
        self.changed = threading.Condition()
        self.max_tokens: int | None = None
        """Of a group, where memory has shown that less fits than its members may take."""
        self._clock = clock
        self._waiting: list[Wish] = []
        self._regulars: set[Traveller] = set()
        """Took part in a group and have not been missed since."""
        self._busy = False
        self._open = False
        self._patient_until = 0.0
        self._round_seconds = 0.0

    @contextmanager
    def alone(self, traveller: Traveller, num_tokens: int, *, on_the_way: bool = False) -> Iterator[None]:
        """The device is this thread's inside the block. A group may be open: its members finish it afterwards.

        `on_the_way`: the traveller is a member of it. Otherwise it is taken to be busy otherwise for a while.
        """
        wish = Wish(traveller, num_tokens, num_tokens, joins=False)
        if not on_the_way:
            self.leave(traveller)
        chosen = self.wait_for(wish)
        assert chosen == [wish]
        try:
            yield
        finally:
            self.release()

    def wait_for(self, wish: Wish) -> list[Wish] | None:
        """The group that this thread has to lead; None when another thread led it and the wish is done.

        The device is the leader's until `release`. If the group has work left after that, call `opened` before it.
        """
        with self.changed:
            self._lift(wish.traveller)
            self._waiting.append(wish)
            self.changed.notify_all()
            try:
                while not wish.done:
                    group = self._choose()
                    if wish in group:
                        self._set_off(group)
                        return group
                    self.changed.wait(self._wait_seconds(group))
            finally:
                if wish in self._waiting:
                    self._waiting.remove(wish)
        return None

    @contextmanager
    def device(self) -> Iterator[None]:
        """For the one who finishes a group; called with `changed` held, which is let go inside."""
        self._busy = True
        self.changed.release()
        try:
            yield
        finally:
            self.changed.acquire()
            self._busy = False
            self.changed.notify_all()

    @property
    def busy(self) -> bool:
        return self._busy

    def release(self) -> None:
        with self.changed:
            self._busy = False
            self.changed.notify_all()

    def opened(self) -> None:
        with self.changed:
            self._open = True

    def closed(self, seconds: float) -> None:
        """The open group is finished, `seconds` after it set off. Its members are given some time to come again."""
        self._open = False
        self._round_seconds = 0.7 * self._round_seconds + 0.3 * seconds if self._round_seconds else seconds
        patience = min(max(PATIENCE_SHARE * self._round_seconds, SHORTEST_PATIENCE), LONGEST_PATIENCE)
        self._patient_until = self._clock() + patience
        self.changed.notify_all()

    def leave(self, traveller: Traveller) -> None:
        """It is not coming for now: nobody needs to wait for it."""
        with self.changed:
            self._regulars.discard(traveller)
            self.changed.notify_all()

    # -- with `changed` held ----------------------------------------------------------------------------------

    def _choose(self) -> list[Wish]:
        """Who goes now; empty while nobody may, or while it is worth waiting for more."""
        if self._busy:
            return []
        wishes = sorted(self._waiting, key=lambda wish: wish.traveller.served)
        if self._open:
            return [wish for wish in wishes if not wish.joins][:1]
        if not wishes:
            return []
        first = wishes[0]
        if not (first.joins and self.together) or first.traveller.alone:
            return [first]
        return self._group(first, wishes)

    def _group(self, first: Wish, wishes: list[Wish]) -> list[Wish]:
        joining = [wish for wish in wishes if wish.joins and not wish.traveller.alone]
        budget = max(wish.max_tokens for wish in joining)
        most = budget if self.max_tokens is None else min(budget, self.max_tokens)
        missing = self._missing()
        ahead = min([first.traveller.served, *(one.served for one in missing)]) + budget
        group, num_tokens = [first], first.num_tokens
        for wish in joining:
            fits = num_tokens + wish.num_tokens <= most and wish.traveller.served <= ahead
            if wish is not first and fits:
                group.append(wish)
                num_tokens += wish.num_tokens
        awaited = [
            one
            for one in missing
            if num_tokens + one.last_tokens <= most or one.served + budget < first.traveller.served
        ]
        if awaited and self._clock() < self._patient_until:
            return []
        self._regulars.difference_update(awaited)  # missed: not waited for again until they come by themselves
        return group

    def _missing(self) -> list[Traveller]:
        here = {wish.traveller for wish in self._waiting}
        return [traveller for traveller in self._regulars if traveller not in here]

    def _set_off(self, group: list[Wish]) -> None:
        self._busy = True
        for wish in group:
            self._waiting.remove(wish)
            wish.traveller.served += wish.num_tokens
            wish.traveller.last_tokens = wish.num_tokens
            if wish.joins:
                self._regulars.add(wish.traveller)

    def _wait_seconds(self, group: list[Wish]) -> float | None:
        """None: until something changes. Otherwise nobody goes because somebody is waited for, or another leads."""
        if group or self._busy or self._open:
            return None
        return max(self._patient_until - self._clock(), 0.0005)

    def _lift(self, traveller: Traveller) -> None:
        """Who was away has no credit from it."""
        others = [wish.traveller.served for wish in self._waiting] + [one.served for one in self._regulars]
        if traveller not in self._regulars and others:
            traveller.served = max(traveller.served, min(others))
