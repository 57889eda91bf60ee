"""Tokens per second through HTTP streaming against the engine alone, and how responsive HTTP stays meanwhile.

The service is a process of its own, started by its own command; so are the clients. The engine alone runs in this
process while they are idle. All three share the machine, so what clients and sockets cost is in the ratio.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench.goals import goal
from bench.measurement import Entry, interleave, quantity, ratio
from bench.plan import Plan
from bench.probe import QUANTITIES, probe
from bench.serving import Row, kv_bytes, serving
from bench.subject import Subject

_WORDS = ("graft", "scion", "stock", "bud", "bark", "root", "sap", "leaf", "twig", "branch", "fruit", "seed", "vine")


@dataclass(frozen=True)
class Running:
    """A service with one tenant."""

    url: str
    ops_url: str
    key: str


def measure(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """All rows at once on the base, the same chat prompts on both sides; from the first byte sent to the last."""
    messages = [_messages(index) for index in range(plan.num_rows)]
    rows = [Row(tuple(subject.base.render_chat(chat))) for chat in messages]
    with ExitStack() as stack:
        rig = stack.enter_context(serving(subject.base, {}, max_num_seqs=plan.num_rows))
        service = stack.enter_context(_service(subject, plan))
        clients = stack.enter_context(_clients())

        def http(num_tokens: int) -> dict[str, Any]:
            order = {
                "url": f"{service.url}/chat/completions",
                "key": service.key,
                "bodies": [_body(chat, num_tokens) for chat in messages],
            }
            return _converse(clients, order)

        def through_http() -> Mapping[str, float]:
            answer = http(plan.streaming_tokens)
            return {
                "end to end": answer["tokens"] / answer["seconds"],
                "first token": median(answer["first_text_seconds"]) * 1e3,
            }

        def engine_alone() -> Mapping[str, float]:
            timeline = rig.run(rows, plan.streaming_tokens)
            first = median(times[0] - timeline.submitted_at for times in timeline.token_times)
            return {"end to end": timeline.tokens_per_second, "first token": first * 1e3}

        rig.run(rows, 4)
        http(4)
        variants = {"engine alone": engine_alone, "HTTP streaming": through_http}
        samples = interleave(variants, plan.streaming_rounds, tick)

        def probing(load: Callable[[], Any]) -> Callable[[], Mapping[str, float]]:
            return lambda: probe(service.url, service.ops_url, service.key, load)

        loads = {
            "service idle": probing(lambda: time.sleep(plan.probe_idle_seconds)),
            "engine saturated": probing(lambda: http(plan.streaming_tokens)),
        }
        probes = interleave(loads, plan.probe_rounds, tick)  # in rounds of their own: they would slow the answers
    of = ("HTTP streaming.end to end", "engine alone.end to end")
    return [
        *(quantity(f"{name}.end to end", samples, "tokens/s") for name in variants),
        *(quantity(f"{name}.first token", samples, "ms") for name in variants),
        ratio("HTTP ÷ engine", samples, *of, goal("HTTP ÷ engine", cuda=subject.is_cuda)),
        *(quantity(f"{name}.{measured}", probes, "ms") for name in loads for measured in QUANTITIES),
    ]


def _messages(index: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": " ".join(_WORDS[(index + i) % len(_WORDS)] for i in range(3))}]


def _body(messages: list[dict[str, str]], num_tokens: int) -> dict[str, Any]:
    return {
        "model": "bench",
        "messages": messages,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@contextmanager
def _service(subject: Subject, plan: Plan) -> Iterator[Running]:
    """`rootstock serve` on the bench's checkpoint, and a tenant."""
    admin_key = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory(prefix="rootstock-bench-") as data_dir:
        command = [sys.executable, "-c", "from service.cli import main; main()", "serve", "--port", "0"]
        command += ["--ops-port", "0", "--base", str(subject.directory), "--base-name", "bench", "--no-training"]
        command += ["--data-dir", data_dir, "--log-level", "error", "--max-num-seqs", str(plan.num_rows)]
        command += ["--prefix-cache", "off"]
        command += ["--kv-cache-bytes", str(kv_bytes(subject.base, plan.num_rows))]
        environment = os.environ | {"ROOTSTOCK_ADMIN_KEY": admin_key, "HF_HUB_OFFLINE": "1"}
        with _process(command, environment) as process:
            url, ops_url = _announced_urls(process)
            answer = httpx.post(
                f"{url}/admin/tenants", json={"name": "bench"}, headers={"authorization": f"Bearer {admin_key}"}
            )
            yield Running(url, ops_url, answer.raise_for_status().json()["api_key"])


@contextmanager
def _clients() -> Iterator[subprocess.Popen[str]]:
    with _process([sys.executable, "-m", "bench.clients"], dict(os.environ)) as process:
        yield process


@contextmanager
def _process(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A child with text pipes, ended with the block; its complaints go to this terminal."""
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        command, env=environment, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _announced_urls(process: subprocess.Popen[str]) -> tuple[str, str]:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"API (http://\S+/v1), operations (http://\S+)", line):
            return found[1], found[2]
    raise RuntimeError("the service did not start; its message is above")


def _converse(process: subprocess.Popen[str], order: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the clients ended; their message is above")
    answer: dict[str, Any] = json.loads(line)
    return answer
