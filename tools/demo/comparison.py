"""Base, few-shot prompt and adapter on the same held-out rows: who answers exactly as the tenant wants?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from openai.types.chat import ChatCompletionMessageParam

from tools.demo.tenant import ALIAS, Example, Tenant

NUM_SHOTS = 6
MAX_CONCURRENT = 16

Prompt = list[ChatCompletionMessageParam]


@dataclass(frozen=True)
class Score:
    """Rows answered exactly right, of `num_rows`."""

    tenant: str
    num_rows: int
    base: int
    few_shot: int
    adapter: int

    @property
    def adapter_is_best(self) -> bool:
        return self.adapter > max(self.base, self.few_shot)


async def compare(tenant: Tenant, base: str, on_answer: Callable[[], None]) -> Score:
    """Ask all held-out rows three ways; `on_answer` is called at each answer."""
    rows, shots = tenant.examples("heldout"), _shots(tenant)
    gate = asyncio.Semaphore(MAX_CONCURRENT)

    async def right(model: str, prompt: Prompt, example: Example) -> bool:
        async with gate:
            answer = await tenant.answer(model, prompt)
        on_answer()
        return answer.text == example.answer

    async def count(model: str, demonstrations: Prompt) -> int:
        prompts = [[*row.prompt[:1], *demonstrations, *row.prompt[1:]] for row in rows]
        asked = zip(prompts, rows, strict=True)
        return sum(await asyncio.gather(*(right(model, prompt, row) for prompt, row in asked)))

    return Score(tenant.name, len(rows), await count(base, []), await count(base, shots), await count(ALIAS, []))


def _shots(tenant: Tenant) -> Prompt:
    """NUM_SHOTS training rows with different answers, as earlier turns of the conversation."""
    by_answer = {example.answer: example for example in reversed(tenant.examples("train"))}
    prompt: Prompt = []
    for example in list(by_answer.values())[:NUM_SHOTS]:
        prompt.append({"role": "user", "content": example.question})
        prompt.append({"role": "assistant", "content": example.answer})
    return prompt
