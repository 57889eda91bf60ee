"""One tenant of the demo: its example set, its API key, its fine-tuning job. Speaks only the public API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from openai.types.chat import ChatCompletionMessageParam
from openai.types.fine_tuning import FineTuningJob

from tools.demo.server import Server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NUM_EPOCHS = {"harbour-bank": 2, "lantern-hotels": 2, "copper-kettle": 4}
"""The tenants, and how long each one's task takes to learn."""

LEARNING_RATE_MULTIPLIER = 1.5
"""Short runs on a small base bear a little more than the usual rate."""

ALIAS = "assistant"
MAX_ANSWER_TOKENS = 80


@dataclass(frozen=True)
class Example:
    """A row of the set: what to send, and the answer the tenant wants."""

    prompt: tuple[ChatCompletionMessageParam, ...]
    answer: str

    @property
    def question(self) -> str:
        return str(self.prompt[-1]["content"])


@dataclass(frozen=True)
class Answer:
    """What came back, and the id of the model that said it."""

    text: str
    model: str


@dataclass(frozen=True)
class Tenant:
    """A tenant that exists on the server, with a client that carries its key."""

    name: str
    client: AsyncOpenAI

    def examples(self, split: str) -> list[Example]:
        """The rows of `<tenant>/<split>.jsonl`."""
        text = (EXAMPLES / self.name / f"{split}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line)["messages"] for line in text.splitlines()]
        return [Example(tuple(row[:-1]), row[-1]["content"]) for row in rows]

    async def start_job(self, base: str) -> FineTuningJob:
        """Upload both files and ask for an adapter of `base` that becomes ALIAS the moment it is published."""
        uploads = [
            await self.client.files.create(file=EXAMPLES / self.name / f"{split}.jsonl", purpose="fine-tune")
            for split in ("train", "validation")
        ]
        return await self.client.fine_tuning.jobs.create(
            model=base,
            training_file=uploads[0].id,
            validation_file=uploads[1].id,
            suffix="demo",
            seed=20,
            method={
                "type": "supervised",
                "supervised": {
                    "hyperparameters": {
                        "n_epochs": NUM_EPOCHS[self.name],
                        "learning_rate_multiplier": LEARNING_RATE_MULTIPLIER,
                    }
                },
            },
            extra_body={"alias": ALIAS},
        )

    async def answer(self, model: str, prompt: Sequence[ChatCompletionMessageParam]) -> Answer:
        """The greedy answer of `model`, which may be an alias."""
        completion = await self.client.chat.completions.create(
            model=model, messages=list(prompt), temperature=0.0, max_tokens=MAX_ANSWER_TOKENS
        )
        return Answer((completion.choices[0].message.content or "").strip(), completion.model)


async def create_tenants(server: Server, names: Sequence[str] = tuple(NUM_EPOCHS)) -> list[Tenant]:
    """Tenants with example sets, all three unless named, made by the admin API."""
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, trust_env=False) as admin:
        return [await _create_tenant(admin, server, name) for name in names]


async def _create_tenant(admin: httpx.AsyncClient, server: Server, name: str) -> Tenant:
    response = await admin.post("/v1/admin/tenants", json={"name": name})
    response.raise_for_status()
    # No retries: what goes wrong shall be counted. No proxies: the service is on this machine.
    client = AsyncOpenAI(
        base_url=f"{server.url}/v1",
        api_key=response.json()["api_key"],
        max_retries=0,
        http_client=DefaultAsyncHttpxClient(trust_env=False),
    )
    return Tenant(name, client)
