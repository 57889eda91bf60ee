"""Chat requests that never pause while the demo runs, and what their users felt. Knows no job."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from openai import OpenAIError

from tools.demo.tenant import Tenant

NUM_USERS = 2
THINK_SECONDS = 0.5
"""Between an answer and the same user's next request."""

MAX_TOKENS = 48
PROMPTS = (
    "Tell me something about the sea.",
    "What did you do in the garden yesterday?",
    "How do I find a good book for a long journey?",
    "Describe an old house at the end of a road.",
)


@dataclass
class Experience:
    """What users met in one phase: seconds between the pieces of an answer, answers, errors."""

    inter_token_seconds: list[float] = field(default_factory=list)
    num_requests: int = 0
    errors: list[str] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Seconds between two pieces that `share` of the gaps stay under; 0.0 with none measured."""
        ordered = sorted(self.inter_token_seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class Traffic:
    """Users in a loop: each sends a chat request, reads the stream to its end, thinks, sends the next."""

    def __init__(self, tenants: Iterable[Tenant], base: str) -> None:
        self._turns = itertools.cycle(tenants)
        self._prompts = itertools.cycle(PROMPTS)
        self._model_of: dict[str, str] = {}
        self._base = base
        self.phases: dict[str, Experience] = {}
        self._phase = ""

    def enter(self, phase: str) -> None:
        """From now on what users meet is counted under `phase`."""
        self._phase = phase
        self.phases.setdefault(phase, Experience())

    def switch(self, tenant: Tenant, model: str) -> None:
        """The tenant's next request names `model`."""
        self._model_of[tenant.name] = model

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        """Requests flow inside this block; those under way are dropped at its end."""
        users = [asyncio.create_task(self._user()) for _ in range(NUM_USERS)]
        try:
            yield
        finally:
            for user in users:
                user.cancel()
                with suppress(asyncio.CancelledError):
                    await user

    async def _user(self) -> None:
        while True:
            tenant, prompt = next(self._turns), next(self._prompts)
            try:
                await self._request(tenant, prompt)
            except OpenAIError as error:
                self.phases[self._phase].errors.append(f"{tenant.name}: {error}")
            await asyncio.sleep(THINK_SECONDS)

    async def _request(self, tenant: Tenant, prompt: str) -> None:
        stream = await tenant.client.chat.completions.create(
            model=self._model_of.get(tenant.name, self._base),
            messages=[{"role": "user", "content": prompt}],
            max_tokens=MAX_TOKENS,
            temperature=0.8,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        last: float | None = None
        async for chunk in stream:
            now = time.perf_counter()
            if not (chunk.choices and chunk.choices[0].delta.content):
                continue
            if last is not None:
                self.phases[self._phase].inter_token_seconds.append(now - last)
            last = now
        self.phases[self._phase].num_requests += 1
