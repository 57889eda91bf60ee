"""Runs the demo from start to end; exit status 1 when anything is not as promised.

The walk: start the service -> three tenants -> three jobs while chat flows -> swap -> compare -> metrics -> stop.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Sequence

import httpx
from openai.types.fine_tuning import FineTuningJob
from rich.progress import Progress, TaskID

from tools.demo import screen
from tools.demo.comparison import Score, compare
from tools.demo.server import Server, ServerError, running_server
from tools.demo.tenant import ALIAS, Tenant, create_tenants
from tools.demo.traffic import Traffic

BASELINE_SECONDS = 6.0
POLL_SECONDS = 1.0
JOB_SECONDS = 170.0
ALONE, TRAINING = "serving alone", "serving + training"


class DemoError(Exception):
    """Something is not as promised; the message says what."""


async def demo() -> None:
    """The whole story. Raises DemoError or ServerError when it does not come out."""
    began = time.monotonic()
    screen.step("Starting rootstock serve on the bundled base")
    async with running_server() as server:
        tenants = await create_tenants(server)
        base = await _base_model(tenants[0])
        screen.step(f"{base} is ready; tenants: {', '.join(tenant.name for tenant in tenants)}")

        before = [await tenant.answer(base, tenant.examples("heldout")[0].prompt) for tenant in tenants]
        traffic = Traffic(tenants, base)
        traffic.enter(ALONE)
        async with traffic.flowing():
            screen.step(f"Chat requests flow; {BASELINE_SECONDS:.0f} s without training for comparison")
            await asyncio.sleep(BASELINE_SECONDS)
            screen.step("Every tenant uploads its examples and asks for an adapter; chat goes on")
            traffic.enter(TRAINING)
            with screen.job_progress() as progress:
                await asyncio.gather(*(_train_and_swap(tenant, base, traffic, progress) for tenant in tenants))
        screen.latency(traffic.phases)

        screen.step("The same request before and after the swap, on the running service")
        for tenant, answer in zip(tenants, before, strict=True):
            example = tenant.examples("heldout")[0]
            screen.swap(tenant.name, example.question, answer, await tenant.answer(ALIAS, example.prompt))

        screen.step("Held-out rows three ways")
        results = await _compare_all(tenants, base)
        screen.scores(results)
        screen.step(f"{server.ops_url}/metrics")
        screen.metrics(await _scrape(server))
        screen.step("Stopping")
    _check(traffic, results)
    screen.step(f"Done in {time.monotonic() - began:.0f} s")


async def _base_model(tenant: Tenant) -> str:
    """The id of the one model a new tenant sees."""
    models = [model.id async for model in tenant.client.models.list()]
    if len(models) != 1:
        raise DemoError(f"a new tenant should see the base alone, but sees {models}")
    return models[0]


async def _train_and_swap(tenant: Tenant, base: str, traffic: Traffic, progress: Progress) -> None:
    """One tenant's job from the upload to its publication, which moves the alias; from then on its chat uses that."""
    bar = progress.add_task(tenant.name, total=None, state="uploading")
    job = await tenant.start_job(base)
    deadline = time.monotonic() + JOB_SECONDS
    while job.status not in ("succeeded", "failed", "cancelled"):
        if time.monotonic() > deadline:
            raise DemoError(f"{tenant.name}: {job.status} after {JOB_SECONDS:.0f} s")
        await asyncio.sleep(POLL_SECONDS)
        job = await tenant.client.fine_tuning.jobs.retrieve(job.id)
        await _show(tenant, job, progress, bar)
    if job.fine_tuned_model is None:
        raise DemoError(f"{tenant.name}: {job.status}: {job.error.message if job.error else 'no reason given'}")
    traffic.switch(tenant, ALIAS)


async def _show(tenant: Tenant, job: FineTuningJob, progress: Progress, bar: TaskID) -> None:
    """Bring the job's bar up to date from its newest metrics event."""
    events = await tenant.client.fine_tuning.jobs.list_events(job.id, limit=20)
    found = next((event.data for event in events.data if event.type == "metrics" and event.data), None)
    if not isinstance(found, dict):
        progress.update(bar, state=job.status)
        return
    loss = found.get("train_loss")
    state = job.status if loss is None else f"{job.status}, loss {loss:.3f}"
    progress.update(bar, completed=found["step"], total=found["total_steps"], state=state)


async def _compare_all(tenants: Sequence[Tenant], base: str) -> list[Score]:
    results = []
    with screen.answer_progress() as progress:
        for tenant in tenants:
            bar = progress.add_task(tenant.name, total=3 * len(tenant.examples("heldout")))
            results.append(await compare(tenant, base, lambda bar=bar: progress.advance(bar)))  # type: ignore[misc]
    return results


async def _scrape(server: Server) -> str:
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.get(f"{server.ops_url}/metrics")).raise_for_status().text


def _check(traffic: Traffic, results: Sequence[Score]) -> None:
    """What was promised: no failed request, no silent phase, every adapter better than prompting the base."""
    for phase, experience in traffic.phases.items():
        if experience.errors:
            raise DemoError(f"{phase}: {len(experience.errors)} requests failed, first: {experience.errors[0]}")
        if not experience.num_requests:
            raise DemoError(f"{phase}: not one request was answered")
    for score in results:
        if not score.adapter_is_best:
            raise DemoError(f"{score.tenant}: the adapter is no better than the base or the few-shot prompt")


async def _until_signal() -> None:
    """The demo; SIGTERM ends it as Ctrl-C does, so that the service never outlives it."""
    task = asyncio.ensure_future(demo())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task


def main() -> int:
    """Run the demo; the exit status of the command."""
    try:
        asyncio.run(_until_signal())
    except (DemoError, ServerError) as error:
        screen.console.print(f"✗ {error}", style="bold red", markup=False)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
