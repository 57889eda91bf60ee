"""Runs the walk from start to end; exit status 1 when the one tenant is not called changed or the other is.

The walk: service and Prometheus -> two tenants train -> ordinary traffic -> one's shifts -> what an operator sees.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tools.demo import screen as demo_screen
from tools.demo.server import Server, ServerError, running_server
from tools.demo.tenant import ALIAS, Tenant, create_tenants
from tools.drift_walk import screen
from tools.drift_walk.prometheus import SCRAPE_SECONDS, Prometheus, PrometheusError, running_prometheus
from tools.drift_walk.speech import Speech
from tools.drift_walk.webhook import Webhook, listening

SHIFTING, STEADY, OTHER_DOMAIN = "harbour-bank", "lantern-hotels", "copper-kettle"
CORRECTED = "not a matter of the bank"
NUM_CORRECTED = 24
NUM_BEFORE_PAUSE = 8
"""Prompts of each tenant without a pause: no more than the watch lets wait to be measured."""

MAX_TOKENS = 16
JOB_SECONDS, SETTLE_SECONDS = 400.0, 60.0


class WalkError(Exception):
    """What should have happened did not; the message says what."""


class Walk:
    """Two tenants on one service, watched by one Prometheus."""

    def __init__(self, server: Server, prometheus: Prometheus, tenants: list[Tenant], seed: int) -> None:
        self._server = server
        self.prometheus = prometheus
        self.tenants = {tenant.name: tenant for tenant in tenants}
        self._speech = {name: Speech(name, OTHER_DOMAIN, seed) for name in self.tenants}
        self._num_asked = 0
        self.called_after: dict[str, int] = {}
        """Shifted prompts until a signal of the shifting tenant was in drift."""

    async def train(self) -> None:
        """An adapter for each, from the project's examples."""
        (base,) = [model.id async for model in self.tenants[SHIFTING].client.models.list()]
        await asyncio.gather(*(_trained(tenant, base) for tenant in self.tenants.values()))

    async def talk(self, num_prompts: int, *, shifted: bool) -> None:
        """Both tenants, turn by turn; `shifted` is said of the one. What it is answered then is corrected at first."""
        for number in range(num_prompts):
            for name in self.tenants:
                answer = await self._ask(name, shifted=shifted and name == SHIFTING)
                if shifted and name == SHIFTING and number < NUM_CORRECTED:
                    body = {"completion_id": answer, "corrected": CORRECTED, "rating": -1}
                    await self.tenants[name].client.post("/feedback", cast_to=object, body=body)
            if shifted or number % NUM_BEFORE_PAUSE == 0:
                await self._settle()
            if shifted:
                for signal in (await self.views())[SHIFTING]["signals"]:
                    if signal["state"] == "drift":
                        self.called_after.setdefault(signal["signal"], number + 1)
        await self._settle()

    async def labels(self) -> dict[str, str]:
        """The ids that stand in metrics and alerts, by name, as the operator looks them up."""
        headers = {"Authorization": f"Bearer {self._server.admin_key}"}
        async with httpx.AsyncClient(base_url=self._server.url, headers=headers, trust_env=False) as admin:
            found = (await admin.get("/v1/admin/tenants")).raise_for_status().json()["data"]
        return {tenant["name"]: tenant["id"] for tenant in found}

    async def views(self) -> dict[str, Any]:
        """`GET /v1/drift/{model}` of each tenant's alias."""
        return {name: await _get(tenant, f"/drift/{ALIAS}") for name, tenant in self.tenants.items()}

    async def show(self) -> None:
        """States, what a scrape says, alerts, and every panel of the dashboard."""
        await asyncio.sleep(3 * SCRAPE_SECONDS)  # longer than what the states take to be written
        screen.states(await self.views())
        screen.lines(await self._scrape(), "rootstock_drift_")
        demo_screen.step("Alerts of Prometheus")
        groups = (await self.prometheus.get("rules"))["groups"]
        held = {rule["name"]: f"{rule.get('duration', 0):.0f} s" for group in groups for rule in group["rules"]}
        screen.alerts(await self.prometheus.alerts(), held)
        demo_screen.step("Dashboard 'tenants and drift'")
        async for panel, values in self.prometheus.panels():
            screen.panel(panel, values)

    async def _ask(self, name: str, *, shifted: bool) -> str:
        messages, user = self._speech[name].next(shifted=shifted)
        completion = await self.tenants[name].client.chat.completions.create(
            model=ALIAS, messages=messages, temperature=0.0, max_tokens=MAX_TOKENS, user=user
        )
        self._num_asked += 1
        return completion.id

    async def _settle(self) -> None:
        """Until every prompt was measured, or left out or lost."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while await self._num_looked_at() < self._num_asked:
            if time.monotonic() > deadline:
                raise WalkError(f"prompts are still unmeasured {SETTLE_SECONDS:.0f} s after they were answered")
            await asyncio.sleep(0.1)

    async def _num_looked_at(self) -> float:
        lines = [
            line for line in (await self._scrape()).splitlines() if line.startswith("rootstock_drift_probes_total")
        ]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    async def _scrape(self) -> str:
        async with httpx.AsyncClient(trust_env=False) as client:
            return (await client.get(f"{self._server.ops_url}/metrics")).raise_for_status().text


async def walk(options: argparse.Namespace) -> None:
    """All of it. Raises WalkError, ServerError or PrometheusError."""
    step = demo_screen.step
    with listening() as webhook:
        async with _started(options, webhook) as walking:
            step("Two tenants train an adapter each")
            await walking.train()
            step(f"In metrics they are {await walking.labels()}")
            step(f"Ordinary traffic: {options.usual} first turns each")
            await walking.talk(options.usual, shifted=False)
            await walking.show()
            bank = walking.tenants[SHIFTING]
            await bank.client.put("/settings", cast_to=object, body={"capture": True})
            step(f"{SHIFTING}'s users turn to what {OTHER_DOMAIN}'s ask; {STEADY}'s do not: {options.shifted} each")
            await walking.talk(options.shifted, shifted=True)
            await asyncio.sleep(options.hold or 0)
            await walking.show()
            step(f"Drift was called after this many shifted prompts: {walking.called_after}")
            step("GET /v1/retraining")
            for proposal in (await _get(bank, "/retraining"))["data"]:
                screen.proposal(proposal)
            step(f"The webhook: {len(webhook.received)} signed events, {webhook.refused} refused")
            screen.events(webhook.received)
            _check(await walking.views())


@asynccontextmanager
async def _started(options: argparse.Namespace, webhook: Webhook) -> AsyncIterator[Walk]:
    flags = ("--drift-webhook-url", webhook.url, "--drift-webhook-secret", webhook.secret)
    demo_screen.step("Starting rootstock serve on the bundled base, and a Prometheus that scrapes it")
    async with (
        running_server(*flags) as server,
        running_prometheus(server.ops_url.removeprefix("http://"), options.hold) as prometheus,
    ):
        tenants = await create_tenants(server, (SHIFTING, STEADY))
        yield Walk(server, prometheus, tenants, options.seed)


async def _trained(tenant: Tenant, base: str) -> None:
    job, deadline = await tenant.start_job(base), time.monotonic() + JOB_SECONDS
    while job.status not in ("succeeded", "failed", "cancelled") and time.monotonic() < deadline:
        await asyncio.sleep(1.0)
        job = await tenant.client.fine_tuning.jobs.retrieve(job.id)
    if job.status != "succeeded":
        raise WalkError(
            f"{tenant.name}: the job is {job.status}: {job.error.message if job.error else 'no reason given'}"
        )


async def _get(tenant: Tenant, path: str) -> Any:
    return await tenant.client.get(path, cast_to=object)


def _check(views: Mapping[str, Any]) -> None:
    """One tenant's traffic has changed, by the rule that pages; the other's has not. One signal of the steady tenant
    may alarm by chance: the budget of false alarms is a promise of few, not of none."""
    if not _has_changed(views[SHIFTING]):
        raise WalkError(f"{SHIFTING}'s traffic shifted, and nobody would be woken")
    if _has_changed(views[STEADY]):
        raise WalkError(f"{STEADY}'s traffic is as it was, and somebody would be woken")


def _has_changed(view: Mapping[str, Any]) -> bool:
    """Two signals drift, or one is twice over its threshold."""
    drifting = [one for one in view["signals"] if one["state"] == "drift"]
    return len(drifting) >= 2 or any((one["ratio"] or 0) >= 2 for one in drifting)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.drift_walk", description=__doc__)
    parser.add_argument("--usual", type=int, default=80, help="first turns of each tenant before the shift")
    parser.add_argument("--shifted", type=int, default=48, help="first turns of each tenant after it")
    parser.add_argument(
        "--hold", type=int, metavar="SECONDS", help="let alerts fire that soon, not when their rules say"
    )
    parser.add_argument("--seed", type=int, default=2)
    return parser.parse_args()


def main() -> int:
    """Run the walk; the exit status of the command."""
    try:
        asyncio.run(walk(_options()))
    except (WalkError, ServerError, PrometheusError) as error:
        demo_screen.console.print(f"✗ {error}", style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
