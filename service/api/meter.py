"""What one answer costs its tenant: counted, held against the rate limit, entered in the books before the client can
know its `usage`. Knows nothing of the answer's JSON.

Booked are whole answers, and of those whose client went away or whose time was up what was generated. An answer that
the service failed to give costs nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from service.api.services import Services
from service.engine.sequence import OutputChunk
from service.errors import ClientDisconnectedError, DeadlineExceededError
from service.tenants import Access
from service.usage_book import Charge
from service.usage_rows import Tokens

Usage = Mapping[str, int | Mapping[str, int]]


class Meter:
    """Of one answer. `reserve` first; then exactly one end counts, the others after it do nothing."""

    def __init__(
        self, services: Services, access: Access, completion_id: str, model: str, num_choices_per_prompt: int = 1
    ) -> None:
        self._services = services
        self._access = access
        self._id = completion_id
        self._model = model
        self._per_prompt = num_choices_per_prompt
        self._reserved: int | None = None
        self._prompt: dict[int, int] = {}
        self._completion: dict[int, int] = {}
        self._cached: dict[int, int] = {}

    def reserve(self, least: int, most: int) -> None:
        """Room for so many tokens in the tenant's rate. Raises RateLimitError."""
        access = self._access
        self._reserved = self._services.rate_limits.reserve(access.tenant.id, access.limits, least=least, most=most)

    def add(self, index: int, chunk: OutputChunk) -> None:
        """A prompt counts once, however many choices it gets; cached is what none of them computed."""
        prompt = index // self._per_prompt
        self._prompt[prompt] = chunk.num_prompt_tokens
        self._cached[prompt] = min(chunk.num_cached_tokens, self._cached.get(prompt, chunk.num_cached_tokens))
        self._completion[index] = chunk.num_output_tokens

    async def finished(self) -> Usage:
        """The usage; once this returns it is in the books. Raises UnavailableError when it cannot be entered."""
        tokens = self._tokens()
        await self.book(tokens)
        return {
            "prompt_tokens": tokens.prompt_tokens,
            "completion_tokens": tokens.completion_tokens,
            "total_tokens": tokens.prompt_tokens + tokens.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": tokens.cached_tokens},
        }

    async def book(self, tokens: Tokens) -> None:
        """As `finished`, of tokens that were counted elsewhere."""
        if self._settle(tokens):
            await asyncio.wrap_future(self._services.usage.book(self._charge(tokens)))

    def abandoned(self) -> None:
        """The client has gone, or its time is up: what was generated is booked behind its back."""
        tokens = self._tokens()
        if self._settle(tokens) and self._prompt:
            self._services.usage.book(self._charge(tokens))

    def failed(self, error: BaseException) -> None:
        if isinstance(error, (ClientDisconnectedError, DeadlineExceededError, asyncio.CancelledError, GeneratorExit)):
            self.abandoned()
        else:
            self._settle(Tokens())

    def _settle(self, tokens: Tokens) -> bool:
        """Give back what was reserved and not used; whether this is the end that counts."""
        if self._reserved is None:
            return False
        reserved, self._reserved = self._reserved, None
        used = tokens.prompt_tokens + tokens.completion_tokens
        tenant, limits = self._access.tenant.id, self._access.limits
        self._services.rate_limits.settle(tenant, limits, reserved=reserved, used=used)
        return True

    def _tokens(self) -> Tokens:
        return Tokens(
            requests=1,
            prompt_tokens=sum(self._prompt.values()),
            completion_tokens=sum(self._completion.values()),
            cached_tokens=sum(self._cached.values()),
        )

    def _charge(self, tokens: Tokens) -> Charge:
        access = self._access
        return Charge(self._id, access.tenant.id, access.key_id, self._model, time.time(), tokens)
