"""The whole soak: start, traffic, kills, quiet moments, a flood, the books, the end. Knows the order."""

from __future__ import annotations

import asyncio
import io
import random
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapters.lora_weights import LoraSpec
from adapters.peft_format import write_adapter
from bench.subject import random_adapter
from service.engine.base_model import load_base_model
from tools.soak import control
from tools.soak.books import Books
from tools.soak.caller import Caller
from tools.soak.flood import Flood, flood
from tools.soak.house import BASE_NAME, MAX_WAITING, SERVICE, SIZES, House
from tools.soak.lanes import Comings, Gate, Lane, delete_tenant, make_tenant
from tools.soak.ledger import Ledger
from tools.soak.plan import Act, Plan
from tools.soak.tenant import Shared, Tenant
from tools.soak.watching import Watching, watching
from tools.soak.windows import Windows

NUM_LIMITED = 2
REQUESTS_PER_MINUTE = 120
"""Of tenants with a limit: now and then they run into it."""
ALL_USAGE = "/v1/admin/usage?start_time={start}&group_by=tenant,api_key&bucket_width=1d&limit=31"

Say = Callable[[str], None]


@dataclass
class Outcome:
    plan: Plan
    ledger: Ledger
    books: Books
    kills: dict[str, int] = field(default_factory=dict)
    accounts: dict[str, int] = field(default_factory=dict)
    watched: dict[str, Any] = field(default_factory=dict)
    flood: Flood | None = None
    seconds: float = 0.0
    still_seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        return {
            "plan": asdict(self.plan),
            "seconds": round(self.seconds, 1),
            "stood_still_seconds": round(self.still_seconds, 1),
            "kills": self.kills,
            **self.ledger.summary(),
            "books": {
                "answers_told": self.books.num_told,
                "answers_cut_short": self.books.num_cut_short,
                "accounts": self.accounts,
            },
            **self.watched,
            "flood": None if self.flood is None else self.flood.summary(),
        }


@dataclass
class Soak:
    plan: Plan
    house: House
    watch: Watching
    shared: Shared
    outcome: Outcome
    say: Say
    gate: Gate = field(default_factory=Gate)
    lanes: list[Lane] = field(default_factory=list)

    @property
    def tenants(self) -> list[Tenant]:
        return [lane.tenant for lane in self.lanes]

    async def run(self) -> None:
        began = time.time()
        await self._move_in()
        comings = Comings(self.shared, self.gate, random.Random(f"{self.plan.seed} comings"))
        tasks = [asyncio.create_task(lane.run()) for lane in self.lanes] + [asyncio.create_task(comings.run())]
        self.gate.open()
        await self._follow_the_timeline()
        await self._quiet("the end of traffic")
        await self._flood()
        await self._quiet("after the flood")
        self.gate.end()
        await asyncio.gather(*tasks)
        await self._settle(began)
        await self._move_out()

    async def _move_in(self) -> None:
        for number in range(self.plan.num_tenants):
            rng = random.Random(f"{self.plan.seed} {number}")
            tenant = await make_tenant(self.shared, f"tenant-{number}", rng)
            assert tenant is not None, "the first requests have to succeed"
            await control.upload(tenant)
            await control.import_model(tenant)
            await control.set_alias(tenant)
            if number < NUM_LIMITED:
                limits = {"limits": {"requests_per_minute": REQUESTS_PER_MINUTE}}
                path = f"/v1/admin/tenants/{tenant.id}"
                await self.shared.caller.send("limit", "PATCH", path, self.house.admin_key, json=limits)
            self.lanes.append(Lane(tenant, self.gate))
        self.say(f"{len(self.lanes)} tenants have moved in")

    async def _follow_the_timeline(self) -> None:
        """Its seconds are traffic's own: what a restart takes, or a machine that stands still, comes on top."""
        windows, ledger = self.shared.caller.windows, self.outcome.ledger
        start, acts = time.monotonic(), 0.0

        def held() -> float:
            return acts + windows.still_seconds

        for at, act in (*self.plan.timeline, (self.plan.seconds, None)):
            while (left := start + held() + at - time.monotonic()) > 0:
                await asyncio.sleep(min(left, 0.5))
            self.say(f"{at:6.1f} s of traffic, {ledger.num_requests} answers: {act or 'it is over'}")
            acted, still = time.monotonic(), windows.still_seconds
            match act:
                case Act.KILL_ENGINE:
                    await self._kill(act, self.house.kill_engine())
                case Act.KILL_SERVICE:
                    await self._kill(act, self._restart())
                case Act.QUIET:
                    await self._quiet("warm")
                case Act.MEASURE | Act.MEASURED:
                    self.watch.is_measuring = act is Act.MEASURE
            acts += time.monotonic() - acted - (windows.still_seconds - still)

    async def _kill(self, act: Act, killing: Any) -> None:
        with self.shared.caller.windows.around(act):
            await killing
        self.outcome.kills[act] = self.outcome.kills.get(act, 0) + 1
        for lane in self.lanes:
            lane.needs_refresh = True

    async def _restart(self) -> None:
        gone = await self.house.kill()
        self.outcome.ledger.expect(gone, "the engine goes when its service is killed")
        await self.house.start()

    async def _quiet(self, name: str) -> None:
        """Everybody waits; jobs are cancelled; then nothing may be held."""
        self.gate.close()
        await self.gate.idle()
        for tenant in self.tenants:
            await control.cancel_jobs(tenant)
        self.shared.num_jobs = 0
        await self.watch.until_quiet()
        await self.shared.caller.reconnect()
        await self.watch.look(name)
        for tenant in self.tenants:
            await control.refresh(tenant)
        self.gate.open()

    async def _flood(self) -> None:
        self.gate.close()
        await self.gate.idle()
        unlimited = self.tenants[NUM_LIMITED:] or self.tenants
        self.outcome.flood = await flood(unlimited, self.plan.flood_factor * MAX_WAITING)
        self.say(f"a flood of {self.outcome.flood.num_requests}: {self.outcome.flood.num_accepted} accepted")

    async def _settle(self, began: float) -> None:
        """The books, by the service's own account."""
        wrong, self.outcome.accounts = await self._audit(began)
        if wrong:
            await asyncio.sleep(2.0)
            later, _ = await self._audit(began)
            for text in wrong:
                self.outcome.ledger.violation(f"the books{'' if text in later else ', two seconds too soon'}: {text}")

    async def _audit(self, began: float) -> tuple[list[str], dict[str, int]]:
        path = ALL_USAGE.format(start=int(began) - 3600)
        page = await self.shared.caller.json("usage", "GET", path, self.house.admin_key)
        assert page is not None
        results = [result for bucket in page["data"] for result in bucket["results"]]
        return self.shared.books.compare(results)

    async def _move_out(self) -> None:
        for tenant in self.tenants:
            await delete_tenant(tenant, self.shared.books)
        await self.shared.caller.http.aclose()
        status = await self.house.stop()
        self.outcome.ledger.expect(status == 0, "SIGTERM ends the service with status 0", status)


async def soak(plan: Plan, say: Say = print, program: str = SERVICE) -> Outcome:
    """Raises HouseError when there is no service to soak. `program` is what serves."""
    ledger, books, start = Ledger(), Books(), time.monotonic()
    outcome = Outcome(plan, ledger, books)
    with TemporaryDirectory(prefix="rootstock-soak-", ignore_cleanup_errors=True) as name:
        house = House(Path(name), program)
        shared = Shared(Caller(house.url, ledger, Windows()), books, house.admin_key, _adapter(house))
        await house.start()
        try:
            async with watching(house, ledger, shared.caller.windows) as watch:
                try:
                    await Soak(plan, house, watch, shared, outcome, say).run()
                except Exception:  # what was seen so far is told all the same
                    ledger.violation(f"the soak could not go on: {traceback.format_exc()[-2000:]}")
                outcome.watched = watch.summary()
                if plan.judges_memory:
                    watch.judge_memory()
        finally:
            if house.process is not None and house.process.poll() is None:
                await house.kill()
    outcome.seconds, outcome.still_seconds = time.monotonic() - start, shared.caller.windows.still_seconds
    return outcome


def _adapter(house: House) -> Path:
    """A zip of a random adapter for the house's base."""
    base = load_base_model(str(house.directory / "base"), quantization="none", name=BASE_NAME)
    weights = random_adapter(SIZES, base.signature, seed=1, spec=LoraSpec(r=SIZES.r, lora_alpha=2.0 * SIZES.r))
    target = house.directory / "adapter.zip"
    with TemporaryDirectory() as name:
        write_adapter(Path(name), weights, base_name=BASE_NAME, base=base.signature)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for path in sorted(Path(name).iterdir()):
                archive.write(path, path.name)
    target.write_bytes(packed.getvalue())
    return target
