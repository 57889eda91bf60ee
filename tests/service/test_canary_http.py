"""The canary through HTTP: aliases that are retrained and deleted under their clients, over a real socket."""

from __future__ import annotations

import hashlib
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.lora_weights import LoraWeights
from service.engine.base_model import load_base_model
from tests.service.canaries import PROMPT_TOKENS, Canaries, Canary, write_canary_base
from tests.service.real_service import RealService, serve_real

NUM_REQUESTS = 240
NUM_CLIENTS = 6
NUM_ALIASES = 8
NUM_TOKENS = 8


class Flock:
    """Aliases of one tenant, each pointing at a canary; the newest of each and what every digest says."""

    def __init__(self, service: RealService, adapters: dict[str, LoraWeights]) -> None:
        self._service = service
        self._adapters = adapters
        self._canaries = Canaries(service.base)
        self._lock = threading.Lock()
        self.models: dict[str, str] = {}
        self.said_by: dict[str, Canary] = {}
        for index in range(NUM_ALIASES):
            self.retrain(f"alias-{index}", service.http())

    def retrain(self, alias: str, http: httpx.Client) -> None:
        with self._lock:  # jobs of the tests' control plane are claimed one at a time
            canary = self._canaries.make()
            digest = hashlib.sha256(repr(canary.name).encode()).hexdigest()
            self._adapters[digest] = canary.weights
            self.said_by[digest] = canary
            model = self._service.control.publish(suffix=alias, digest=digest)
            http.put(f"/v1/aliases/{alias}", json={"model": model}).raise_for_status()
            before, self.models[alias] = self.models.get(alias), model
        if before is not None:
            assert http.delete(f"/v1/models/{before}").json()["deleted"]


@pytest.mark.slow
def test_no_client_reads_another_adapters_name(
    tiny_llama_dir: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    directory = tmp_path / "base"
    write_canary_base(tiny_llama_dir, directory)
    base = load_base_model(str(directory), quantization="none")
    adapters: dict[str, LoraWeights] = {}
    counts: Counter[str] = Counter()
    sizes: Any = {
        "max_lora_slots": 3,
        "max_host_adapters": 5,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 64,
    }
    with serve_real(base, tmp_path, adapters, prefill_chunk=24, **sizes) as service:
        flock = Flock(service, adapters)

        def client(number: int) -> None:
            rng, http = random.Random(number), service.http()
            for _ in range(NUM_REQUESTS // NUM_CLIENTS):
                alias = f"alias-{rng.randrange(NUM_ALIASES)}"
                body = {
                    "model": alias,
                    "prompt": rng.choices(PROMPT_TOKENS, k=rng.randrange(1, 40)),
                    "max_tokens": NUM_TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                answer = http.post("/v1/completions", json=body)
                counts["requests"] += 1
                if answer.status_code != 200:  # retrained and deleted between two breaths
                    counts["gone"] += 1
                    continue
                name = flock.said_by[answer.headers["x-rootstock-adapter"]].name
                expected = base.tokenizer.decode([name[place % len(name)] for place in range(NUM_TOKENS)])
                counts["wrong"] += answer.json()["choices"][0]["text"] != expected
                counts["answered"] += 1
                if rng.random() < 0.1:
                    flock.retrain(alias, http)
                    counts["retrained"] += 1

        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            list(pool.map(client, range(NUM_CLIENTS)))
    for name, count in counts.items():
        record_property(name, count)
    print(f"\ncanary over HTTP: {dict(counts)}")
    assert (counts["requests"], counts["wrong"]) == (NUM_REQUESTS, 0)
    assert counts["retrained"] > 5 and counts["answered"] > 0.9 * NUM_REQUESTS
