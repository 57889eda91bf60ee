"""kill -9 in the middle of traffic: what clients were told is in the books, once."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running_service import rootstock_serve

NUM_KILLS = 2
NUM_CLIENTS = 4


@dataclass
class Told:
    """What clients were told by answers that they received whole; and how many requests never got that far."""

    tokens: Counter[str] = field(default_factory=Counter)
    cut_short: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, usage: dict[str, int]) -> None:
        with self.lock:
            self.tokens += Counter(requests=1, prompt=usage["prompt_tokens"], completion=usage["completion_tokens"])


def ask(http: httpx.Client, told: Told, number: int) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": f"{number}"}], "max_tokens": 1 + number % 7}
    if number % 2:
        answer = http.post("/v1/chat/completions", json=body)
        if answer.status_code == 200:
            told.add(answer.json()["usage"])
        return
    streaming = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/chat/completions", json=streaming) as response:
        for line in response.iter_lines():
            if '"usage":{' in line:
                told.add(httpx.Response(200, content=line.removeprefix("data: ")).json()["usage"])


def traffic(url: str, key: str, told: Told, until: threading.Event, seed: int) -> None:
    number = seed
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=30) as http:
        while not until.is_set():
            number += NUM_CLIENTS
            try:
                ask(http, told, number)
            except httpx.TransportError:
                with told.lock:
                    told.cut_short += 1
                until.wait(0.05)


def books(url: str, key: str) -> Counter[str]:
    query = {"start_time": str(int(time.time()) - 7200), "bucket_width": "1d"}
    page = httpx.get(f"{url}/v1/usage", params=query, headers={"authorization": f"Bearer {key}"}).raise_for_status()
    results = [result for bucket in page.json()["data"] for result in bucket["results"]]
    names = {"requests": "num_model_requests", "prompt": "input_tokens", "completion": "output_tokens"}
    return Counter({name: sum(result[field] for result in results) for name, field in names.items()})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_after_kills_the_books_hold_what_clients_were_told_and_what_was_cut_short_at_most(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    rng, told, key = random.Random(20), Told(), ""
    settings: dict[str, Any] = {
        "base_name": "base",
        "quantization": "none",
        "training": False,
        "kv_cache_bytes": "32MiB",
    }
    for _ in range(NUM_KILLS):
        with rootstock_serve(tiny_llama_dir, tmp_path, **settings) as running:
            key = key or running.client().api_key
            done = threading.Event()
            threads = [
                threading.Thread(target=traffic, args=(running.url, key, told, done, seed))
                for seed in range(NUM_CLIENTS)
            ]
            for thread in threads:
                thread.start()
            time.sleep(rng.uniform(1.0, 3.0))
            running.process.kill()
            running.process.wait()
            done.set()
            for thread in threads:
                thread.join(60)
    with rootstock_serve(tiny_llama_dir, tmp_path, **settings) as running:
        after_kills = books(running.url, key)
        assert told.tokens["requests"] > NUM_KILLS * NUM_CLIENTS
        for name, seen in told.tokens.items():
            assert seen <= after_kills[name], name
        # a killed answer may be in the books though its client was not told any more: one for each client and kill
        assert after_kills["requests"] - told.tokens["requests"] <= NUM_KILLS * NUM_CLIENTS
        quiet = Told()
        with httpx.Client(base_url=running.url, headers={"authorization": f"Bearer {key}"}, timeout=30) as http:
            for number in range(20):
                ask(http, quiet, number)
        assert books(running.url, key) - after_kills == quiet.tokens  # received whole: equal
    print(f"told {dict(told.tokens)}, books {dict(after_kills)}, cut short {told.cut_short}")
