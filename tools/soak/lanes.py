"""What each tenant does next, chosen by its own random numbers, until it is told to wait or to end. Knows no answer."""

from __future__ import annotations

import asyncio
import random
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from tools.soak import control, generation
from tools.soak.books import Books
from tools.soak.tenant import Shared, Tenant

Operation = Callable[[Tenant], Awaitable[None]]
OPERATIONS: Sequence[tuple[Operation, float]] = (
    (generation.chat, 8),
    (generation.chat_stream, 8),
    (generation.chat_with_choices, 3),
    (generation.chat_with_schema, 3),
    (generation.chat_with_logprobs, 2),
    (generation.completion, 4),
    (generation.completion_stream, 4),
    (generation.left_stream, 3),
    (generation.left_answer, 1),
    (generation.embed, 4),
    (generation.official_client, 4),
    (generation.over_the_limits, 3),
    (control.upload, 3),
    (control.list_files, 1),
    (control.read_file, 1),
    (control.delete_file, 0.5),
    (control.file_report, 0.3),
    (control.create_job, 2),
    (control.look_at_jobs, 3),
    (control.steer_job, 1),
    (control.import_model, 0.5),
    (control.export_model, 0.5),
    (control.list_models, 1),
    (control.delete_model, 0.4),
    (control.set_alias, 1),
    (control.roll_back, 0.5),
    (control.canary, 1),
    (control.feedback, 2),
    (control.watch, 1.5),
    (control.rotate_key, 0.5),
)
PAUSE_SECONDS = 0.1
"""On average, between two operations."""


@dataclass
class Gate:
    """Closed, nobody begins anything; `idle` when nobody is at anything any more."""

    _open: asyncio.Event = field(default_factory=asyncio.Event)
    _num_busy: int = 0
    ended: bool = False

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def end(self) -> None:
        self.ended = True
        self._open.set()

    async def idle(self) -> None:
        while self._num_busy:
            await asyncio.sleep(0.05)

    async def run(self, operation: Callable[[], Awaitable[None]]) -> None:
        while not self._open.is_set():  # it may have been closed again before who waited is resumed
            await self._open.wait()
        if self.ended:
            return
        self._num_busy += 1
        try:
            await operation()
        finally:
            self._num_busy -= 1


@dataclass
class Lane:
    tenant: Tenant
    gate: Gate
    needs_refresh: bool = False

    async def run(self) -> None:
        rng = self.tenant.rng
        operations, weights = zip(*OPERATIONS, strict=True)
        while not self.gate.ended:
            (operation,) = rng.choices(operations, weights)
            await self.gate.run(lambda: self._do(operation))  # noqa: B023 it is awaited at once
            await asyncio.sleep(rng.expovariate(1 / PAUSE_SECONDS))

    async def _do(self, operation: Operation) -> None:
        try:
            if self.needs_refresh:
                self.needs_refresh = False
                await control.refresh(self.tenant)
            await operation(self.tenant)
        except Exception:
            self.tenant.shared.caller.ledger.violation(f"{operation.__name__}: {traceback.format_exc()[-600:]}")


@dataclass
class Comings:
    """Tenants that come, do a little and are deleted, some of them in the middle of an answer."""

    shared: Shared
    gate: Gate
    rng: random.Random
    num_made: int = 0

    async def run(self) -> None:
        while not self.gate.ended:
            await self.gate.run(self._one)
            await asyncio.sleep(self.rng.expovariate(1.0))

    async def _one(self) -> None:
        try:
            self.num_made += 1
            tenant = await make_tenant(self.shared, f"passing-{self.num_made}", random.Random(self.rng.random()))
            if tenant is None:
                return
            await control.upload(tenant)
            await control.import_model(tenant)
            await control.set_alias(tenant)
            for operation in (generation.chat, generation.embed, generation.chat_stream):
                await operation(tenant)
            await delete_tenant(tenant, self.shared.books)
        except Exception:
            self.shared.caller.ledger.violation(f"a passing tenant: {traceback.format_exc()[-600:]}")


async def make_tenant(shared: Shared, name: str, rng: random.Random) -> Tenant | None:
    caller, admin = shared.caller, shared.admin_key
    made = await caller.json("create tenant", "POST", "/v1/admin/tenants", admin, json={"name": name})
    if made is None:
        return None
    keys = await caller.json("list keys", "GET", "/v1/keys", made["api_key"])
    if keys is None:
        return None
    return Tenant(shared, rng, made["id"], name, made["api_key"], keys["data"][0]["id"])


async def delete_tenant(tenant: Tenant, books: Books) -> None:
    """Its key is refused at once."""
    caller, admin = tenant.shared.caller, tenant.shared.admin_key
    books.deleted.add(tenant.id)
    path = f"/v1/admin/tenants/{tenant.id}"
    while await caller.send("delete tenant", "DELETE", path, admin, expect=(200, 404)) is None:
        pass
    await caller.send("refused: deleted tenant", "GET", "/v1/models", tenant.key, expect=(401,))
