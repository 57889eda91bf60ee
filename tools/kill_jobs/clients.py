"""What the tenants ask for, and what they were told: every answer 200 is kept, to be held against the service later.

Knows HTTP, not who kills the service meanwhile. What got no answer is asked again under the same Idempotency-Key.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

import httpx

from tools.kill_jobs.recipes import Recipe
from tools.kill_jobs.victims import ADMIN_KEY

FINAL = ("succeeded", "failed", "cancelled")


@dataclass
class Request:
    """A job that shall be made."""

    key: str
    recipe: Recipe
    alias: str | None
    job: str | None = None


@dataclass
class Tenant:
    """A tenant and what it was told."""

    name: str
    key: str
    files: dict[str, str] = field(default_factory=dict)
    """id -> sha256, of uploads that were acknowledged."""
    file_of: dict[int, str] = field(default_factory=dict)
    """Recipe -> file."""
    requests: list[Request] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)
    models: list[str] = field(default_factory=list)
    moves: list[tuple[str, bool]] = field(default_factory=list)
    """Of the alias `hand`: to which model, and whether the move was acknowledged."""

    @property
    def jobs(self) -> dict[str, Request]:
        return {request.job: request for request in self.requests if request.job is not None}


class Clients:
    def __init__(self, rng: random.Random, recipes: tuple[Recipe, ...], *, num_tenants: int = 3) -> None:
        self._rng, self._recipes = rng, recipes
        self._names = [f"tenant-{number}" for number in range(num_tenants)]
        self.tenants: list[Tenant] = []
        self.violations: list[str] = []

    def introduce(self, url: str) -> None:
        """Make the tenants; call it while nobody kills."""
        admin = {"authorization": f"Bearer {ADMIN_KEY}"}
        for name in self._names:
            made = httpx.post(f"{url}/v1/admin/tenants", json={"name": name}, headers=admin, timeout=30)
            self.tenants.append(Tenant(name, made.raise_for_status().json()["api_key"]))

    def ask(self, url: str, *, num_unfinished: int) -> int:
        """Keep so many jobs going, move an alias, cancel one now and then; how many jobs are unfinished. Raises
        httpx.TransportError when the service is gone."""
        unfinished = 0
        for tenant in self.tenants:
            with _http(url, tenant) as http:
                unfinished += self._look(http, tenant)
        while unfinished < num_unfinished:
            tenant = self._rng.choice(self.tenants)
            alias = "best" if self._rng.random() < 0.5 else None
            self.order(tenant, self._choose(), alias)
            unfinished += 1
        for tenant in self.tenants:
            with _http(url, tenant) as http:
                self._submit(http, tenant)
        return unfinished

    def order(self, tenant: Tenant, recipe: Recipe, alias: str | None) -> None:
        """To be submitted with the next `ask`."""
        tenant.requests.append(Request(f"{tenant.name}-{len(tenant.requests)}", recipe, alias))

    def move_aliases(self, url: str) -> None:
        for tenant in self.tenants:
            if tenant.models:
                with _http(url, tenant) as http:
                    self._move(http, tenant, self._rng.choice(tenant.models))

    def cancel_one(self, url: str) -> None:
        tenant = self._rng.choice(self.tenants)
        going = [job for job in tenant.jobs if job not in tenant.cancelled]
        if going:
            with _http(url, tenant) as http:
                if http.post(f"/v1/fine_tuning/jobs/{going[-1]}/cancel").status_code == 200:
                    tenant.cancelled.add(going[-1])

    def _choose(self) -> Recipe:
        *quick, slow = self._recipes
        if not quick:
            return slow
        return slow if self._rng.random() < 0.05 else self._rng.choice(quick)

    def _look(self, http: httpx.Client, tenant: Tenant) -> int:
        """How many of its jobs are unfinished; one that was acknowledged and is not there is a violation."""
        unfinished = 0
        for request in tenant.requests:
            if request.job is None:
                unfinished += 1
                continue
            answer = http.get(f"/v1/fine_tuning/jobs/{request.job}")
            if answer.status_code != 200:
                self.violations.append(f"{request.job} was acknowledged, and now answers {answer.status_code}")
                continue
            job = answer.json()
            unfinished += job["status"] not in FINAL
            if request.job in tenant.cancelled and job["status"] != "cancelled":
                self.violations.append(f"{request.job} was cancelled, and now is {job['status']}")
            if job["fine_tuned_model"] and job["fine_tuned_model"] not in tenant.models:
                tenant.models.append(job["fine_tuned_model"])
        return unfinished

    def _submit(self, http: httpx.Client, tenant: Tenant) -> None:
        for request in tenant.requests:
            if request.job is not None:
                continue
            body = request.recipe.body("tiny", self._upload(http, tenant, request.recipe), request.alias)
            answer = http.post("/v1/fine_tuning/jobs", json=body, headers={"idempotency-key": request.key})
            answer.raise_for_status()
            request.job = answer.json()["id"]

    def _upload(self, http: httpx.Client, tenant: Tenant, recipe: Recipe) -> str:
        if recipe.number not in tenant.file_of:
            content = recipe.rows
            made = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("train.jsonl", content)})
            file_id = made.raise_for_status().json()["id"]
            tenant.files[file_id] = hashlib.sha256(content).hexdigest()
            tenant.file_of[recipe.number] = file_id
        return tenant.file_of[recipe.number]

    def _move(self, http: httpx.Client, tenant: Tenant, model: str) -> None:
        tenant.moves.append((model, False))
        answer = http.put("/v1/aliases/hand", json={"model": model})
        answer.raise_for_status()
        tenant.moves[-1] = (model, True)

    # -- afterwards -------------------------------------------------------------------------------------------

    def compare(self, url: str) -> list[str]:
        """What the service says now, against what it said before."""
        wrong = list(self.violations)
        for tenant in self.tenants:
            with _http(url, tenant) as http:
                for file_id, digest in tenant.files.items():
                    content = http.get(f"/v1/files/{file_id}/content")
                    if content.status_code != 200 or hashlib.sha256(content.content).hexdigest() != digest:
                        wrong.append(f"{file_id} was acknowledged, and now is not what was sent")
                wrong += self._compare_aliases(http, tenant)
                wrong += self._answers(http, tenant)
        return wrong

    def _compare_aliases(self, http: httpx.Client, tenant: Tenant) -> list[str]:
        if not tenant.moves:
            return []
        acknowledged = [number for number, (_, told) in enumerate(tenant.moves) if told]
        since = acknowledged[-1] if acknowledged else 0
        possible = {model for model, _ in tenant.moves[since:]}
        answer: dict[str, Any] = http.get("/v1/aliases/hand").json()
        if acknowledged and answer.get("model") not in possible:
            return [f"alias hand of {tenant.name} is {answer}, and was moved to {sorted(possible)}"]
        return []

    def _answers(self, http: httpx.Client, tenant: Tenant) -> list[str]:
        """Its newest model can be used."""
        if not tenant.models:
            return []
        body = {"model": tenant.models[-1], "messages": [{"role": "user", "content": "word 1?"}], "max_tokens": 2}
        answer = http.post("/v1/chat/completions", json=body)
        return [] if answer.status_code == 200 else [f"{tenant.models[-1]} answers {answer.status_code}: {answer.text}"]


def _http(url: str, tenant: Tenant) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"authorization": f"Bearer {tenant.key}"}, timeout=600)
