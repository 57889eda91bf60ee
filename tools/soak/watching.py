"""Looks at the service's processes all the time, and closely when all is quiet. Knows no request."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from tools.soak.house import House
from tools.soak.ledger import Ledger
from tools.soak.processes import Picture, children, command_of, picture
from tools.soak.slope import Slope, slope_of
from tools.soak.windows import Windows

SAMPLE_SECONDS = 1.0
QUIET_SECONDS = 120.0
"""For what was accepted to be finished, once nobody asks any more."""
SPARE_THREADS = 40
"""Of the pool that answers requests: how many have been needed so far is chance."""
DATABASE_HANDLES = 3
"""Of each thread with a connection: the file, its journal, and what they share."""
MAX_GROWTH_MIB = 1.0
"""A minute. What is certainly beyond it grows."""


@dataclass(frozen=True)
class Quiet:
    """What there is when nothing is going on."""

    processes: dict[str, Picture]
    other_children: tuple[str, ...]
    gauges: dict[str, float]
    temporary: tuple[str, ...]


@dataclass
class Watching:
    house: House
    ledger: Ledger
    windows: Windows
    series: defaultdict[str, list[tuple[float, float, int, int]]] = field(default_factory=lambda: defaultdict(list))
    """By process: seconds, MiB, handles, threads; while memory is measured."""
    is_measuring: bool = False
    quiets: list[tuple[str, Quiet]] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            if self.is_measuring:
                for role, pid in (("api", self.house.pid), ("engine", self.house.engine_pid)):
                    seen = None if pid is None else picture(pid)
                    if seen is not None:
                        now = time.monotonic() - self.windows.still_seconds
                        sample = (now, seen.memory_mib, seen.handles.total(), seen.num_threads)
                        self.series[role].append(sample)
            await asyncio.sleep(SAMPLE_SECONDS)

    async def until_quiet(self) -> None:
        """Nothing runs, waits or trains; a violation when that does not come."""
        deadline = time.monotonic() + QUIET_SECONDS
        while busy := _busy(await self.house.gauges()):
            if time.monotonic() > deadline:
                self.ledger.violation(f"not quiet after {QUIET_SECONDS:.0f} s: {busy}")
                return
            await asyncio.sleep(0.25)

    async def look(self, name: str) -> None:
        """With everything quiet and no client connected. Nothing is held; and no more than when last looked."""
        engine = self.house.engine_pid
        now = await self._settled(engine)
        held = _busy(now.gauges)
        self.ledger.expect(not held, "nothing is held when all is quiet", f"{name}: {held}")
        self.ledger.expect(not now.other_children, "one child, the engine", f"{name}: {now.other_children}")
        for before_name, before in self.quiets[-1:]:
            for role in now.processes.keys() & before.processes.keys():
                self._compare(f"{role}, {before_name} to {name}", before.processes[role], now.processes[role])
        left = sorted(now.temporary)
        self.ledger.expect(not left, "no temporary file is left", f"{name}: {left}")
        self.quiets.append((name, now))

    async def _settled(self, engine: int | None) -> Quiet:
        """Connections take a moment to close."""
        for _ in range(20):
            await asyncio.sleep(0.25)
            roles = {"api": self.house.pid} | ({} if engine is None else {"engine": engine})
            seen = {role: found for role, pid in roles.items() if (found := picture(pid)) is not None}
            if seen["api"].handles["socket"] <= 8:
                break
        others = tuple(command_of(pid) for pid in children(self.house.pid) if pid != engine)
        temporary = tuple(str(path.relative_to(self.house.temporary)) for path in self.house.temporary.iterdir())
        return Quiet(seen, others, await self.house.gauges(), temporary)

    def _compare(self, what: str, before: Picture, now: Picture) -> None:
        for kind in before.handles.keys() | now.handles.keys():
            spare = SPARE_THREADS * DATABASE_HANDLES if kind == "database" else 2
            more = now.handles[kind] - before.handles[kind]
            self.ledger.expect(more <= spare, "no handle is leaked", f"{what}: {more} more of {kind}")
        more = now.num_threads - before.num_threads
        self.ledger.expect(more <= SPARE_THREADS, "no thread is leaked", f"{what}: {more} more threads")

    def slopes(self) -> dict[str, Slope]:
        found = {}
        for role, samples in self.series.items():
            slope = slope_of([sample[0] for sample in samples], [sample[1] for sample in samples])
            if slope is not None:
                found[role] = slope
        return found

    def judge_memory(self) -> None:
        slopes = self.slopes()
        for role in ("api", "engine"):
            slope = slopes.get(role)
            flat = slope is not None and slope.low <= MAX_GROWTH_MIB
            self.ledger.expect(flat, "memory is flat", f"{role}: {slope}")

    def summary(self) -> dict[str, Any]:
        return {
            "memory_mib_per_minute": {role: asdict(slope) for role, slope in self.slopes().items()},
            "memory_mib": {role: _range([s[1] for s in samples]) for role, samples in self.series.items()},
            "handles": {role: _range([float(s[2]) for s in samples]) for role, samples in self.series.items()},
            "threads": {role: _range([float(s[3]) for s in samples]) for role, samples in self.series.items()},
            "quiet": {name: _shown(quiet) for name, quiet in self.quiets},
        }


@asynccontextmanager
async def watching(house: House, ledger: Ledger, windows: Windows) -> AsyncIterator[Watching]:
    watch = Watching(house, ledger, windows)
    tasks = [asyncio.create_task(watch.run()), asyncio.create_task(windows.watch_for_standstills())]
    try:
        yield watch
    finally:
        for task in tasks:
            task.cancel()


def _busy(gauges: dict[str, float]) -> dict[str, float]:
    """Whatever is not zero and should be, when nobody asks for anything; a lost scrape is no quiet."""
    names = [f"rootstock_{name}" for name in ("requests_running", "requests_waiting", "adapters_pinned")]
    names.append("rootstock_kv_cache_usage_ratio")
    names += [f'rootstock_jobs_unfinished{{state="{state}"}}' for state in ("queued", "running")]
    return {name: value for name in names if (value := gauges.get(name, float("nan"))) != 0.0}


def _range(values: list[float]) -> dict[str, float]:
    return {"first": values[0], "last": values[-1], "least": min(values), "most": max(values)}


def _shown(quiet: Quiet) -> dict[str, Any]:
    shown: dict[str, Any] = {
        role: {"memory_mib": round(p.memory_mib, 1), "handles": dict(Counter(p.handles)), "threads": p.num_threads}
        for role, p in quiet.processes.items()
    }
    return {**shown, "temporary": list(quiet.temporary)}
