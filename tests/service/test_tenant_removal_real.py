"""A tenant that uses everything is deleted while it is answered and trained; then everything is searched."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.tenant_inventory import TABLES, Fate
from tests.running_service import ADMIN_KEY, Running, rootstock_serve

pytestmark = pytest.mark.slow

MARKER = "quincemarmalade"
QUICK = {"n_epochs": 1, "batch_size": 8, "learning_rate": 5e-3, "lora_r": 4}
LONG = {**QUICK, "n_epochs": 50, "batch_size": 1}
PROMPT = f"{MARKER} is what I like, and a long prompt so that a block of it is kept. " * 4


def examples(number: int) -> bytes:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{MARKER} {n}?"},
                {"role": "assistant", "content": f"{MARKER} {n}!"},
            ]
        }
        for n in range(number)
    ]
    return "\n".join(json.dumps(line) for line in lines).encode()


class Household:
    """One tenant of a running service."""

    def __init__(self, running: Running, name: str, clients: ExitStack) -> None:
        made = httpx.post(f"{running.url}/v1/admin/tenants", json={"name": name}, headers=admin()).raise_for_status()
        self.id, self.key = made.json()["id"], made.json()["api_key"]
        headers = {"authorization": f"Bearer {self.key}"}
        self.http = clients.enter_context(httpx.Client(base_url=f"{running.url}/v1", headers=headers, timeout=60))
        self.running = running

    def call(self, method: str, path: str, **request: Any) -> Any:
        answer = self.http.request(method, path, **request)
        assert answer.is_success, answer.text
        return answer.json()

    def is_taken(self, path: str, body: Any) -> bool:
        return self.http.post(path, json=body).is_success

    def job(self, **body: Any) -> str:
        files = {"file": ("train.jsonl", examples(24))}
        file = self.call("POST", "/files", files=files, data={"purpose": "fine-tune"})["id"]
        job: str = self.call("POST", "/fine_tuning/jobs", json={"model": "base", "training_file": file, **body})["id"]
        return job

    def trained(self, **body: Any) -> str:
        job = self.job(hyperparameters=QUICK, **body)
        self.running.wait_until(
            lambda: self.call("GET", f"/fine_tuning/jobs/{job}")["status"] in ("succeeded", "failed")
        )
        model = self.call("GET", f"/fine_tuning/jobs/{job}")["fine_tuned_model"]
        assert model, self.call("GET", f"/fine_tuning/jobs/{job}/events")
        return str(model)

    def chat(self, model: str, **body: Any) -> Any:
        messages = [{"role": "user", "content": PROMPT}]
        return self.call(
            "POST", "/chat/completions", json={"model": model, "messages": messages, "max_tokens": 4, **body}
        )


def admin() -> dict[str, str]:
    return {"authorization": f"Bearer {ADMIN_KEY}"}


def use_everything(tenant: Household) -> None:
    tenant.call("PUT", "/settings", json={"capture": True, "capture_days": 7})
    stable, candidate = tenant.trained(suffix="one"), tenant.trained(suffix="two", seed=2)
    tenant.call("PUT", "/aliases/best", json={"model": stable})
    tenant.call("PUT", "/aliases/best/canary", json={"model": candidate, "percent": 50})
    tenant.call("PUT", "/aliases/best/shadow", json={"model": candidate, "percent": 100})
    schema = {"type": "object", "properties": {MARKER: {"type": "boolean"}}, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema, "strict": True}}
    for number in range(8):
        completion = tenant.chat("best", user=f"user-{number}")["id"]
        tenant.chat("base", response_format=form)
        body = {"completion_id": completion, "rating": 1, "corrected": MARKER, "user": f"user-{number}"}
        tenant.running.wait_until(partial(tenant.is_taken, "/feedback", body))
    assert tenant.chat("base")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    tenant.call("POST", "/keys", json={"name": MARKER, "role": "inference"})
    merge = tenant.call("POST", f"/adapters/{stable}/merge")["id"]
    tenant.running.wait_until(lambda: tenant.call("GET", f"/merges/{merge}")["status"] == "succeeded")
    tenant.running.wait_until(lambda: tenant.call("GET", "/captures")["data"])


def found_on_disk(directory: Path, words: list[str]) -> list[str]:
    """Files of the data directory that hold one of the words, or are named by one."""
    found = []
    for path in directory.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found += [f"{path.relative_to(directory)}: {word}" for word in words if word.encode() in content]
        found += [str(path.relative_to(directory)) for word in words if word in path.name]
    return sorted(found)


@pytest.mark.timeout(600)
def test_a_tenant_that_uses_everything_is_deleted_while_it_is_answered_and_trained(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "base_name": "base",
        "quantization": "none",
        "kv_cache_bytes": "32MiB",
        "resume_point_seconds": 0,
    }
    with rootstock_serve(tiny_llama_dir, tmp_path, **settings) as running, ExitStack() as clients:
        doomed, spared = Household(running, "doomed", clients), Household(running, "spared", clients)
        spared.chat("base")
        use_everything(doomed)
        job = doomed.job(hyperparameters=LONG)
        storage = tmp_path / "storage"
        running.wait_until(lambda: list((storage / "training").glob(f"{job}/*.pt")))
        ids = [doomed.id, job, *(one["id"] for one in doomed.call("GET", "/files")["data"])]
        digests = [path.name for path in (storage / "adapters" / "sha256").iterdir()]
        assert len(digests) >= 2 and list((tmp_path / "merged").iterdir())
        assert any(MARKER in line for line in found_on_disk(tmp_path, [MARKER]))

        lines: list[str] = []
        body = {"model": "best", "prompt": PROMPT, "max_tokens": 250, "stream": True, "ignore_eos": True}
        began = threading.Event()

        def read() -> None:
            with doomed.http.stream("POST", "/completions", json=body) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    began.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert began.wait(60)
        answer = httpx.delete(f"{running.url}/v1/admin/tenants/{doomed.id}", headers=admin(), timeout=60)
        assert answer.json() == {"id": doomed.id, "object": "tenant", "deleted": True, "erased": True}
        assert doomed.http.get("/models").status_code == 401
        reader.join(60)
        errors = [line for line in lines if '"error"' in line]
        assert len(errors) == 1 and "the tenant was deleted" in errors[0], lines[-3:]

        # its job notices at its next heartbeat; what it still wrote goes then
        log = tmp_path / "log"
        ended = re.compile(f'"tuning.run_finished".*"{job}".*"outcome": "(lost|cancelled)"')
        running.wait_until(lambda: bool(ended.search(log.read_text())))
        running.wait_until(lambda: not found_on_disk(storage, [MARKER, *ids]), 30)
        assert found_on_disk(tmp_path / "merged", [MARKER]) == [] and list((tmp_path / "merged").iterdir()) == []
        assert [path.name for path in (storage / "adapters" / "sha256").iterdir() if path.name[0] != "."] == []
        assert MARKER not in log.read_text()
        assert running.ready()

        database = tmp_path / "rootstock.db"
        for path in (database, database.with_name("rootstock.db-wal")):
            assert MARKER.encode() not in path.read_bytes(), path
        with sqlite3.connect(database) as opened:
            for table, fate in TABLES.items():
                rows = str(opened.execute(f"SELECT * FROM {table}").fetchall())
                if fate in (Fate.GONE, Fate.ANONYMOUS):
                    assert not [word for word in ("doomed", *ids, *digests) if word in rows], table
        metrics = httpx.get(f"{running.ops_url}/metrics").text
        assert doomed.id not in metrics and not [digest for digest in digests if digest in metrics]
        assert spared.id in metrics

        again = Household(running, "doomed", clients)
        for route in ("files", "fine_tuning/jobs", "adapters", "aliases", "captures", "feedback", "merges", "drift"):
            assert again.call("GET", f"/{route}")["data"] == [], route
        assert [model["id"] for model in again.call("GET", "/models")["data"]] == ["base"]
        assert again.chat("base")["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert spared.chat("base")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
