"""A service, started by its own command, and clients, each in a process of its own. Knows no measurement."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.plan import Plan
from bench.serving import kv_bytes
from bench.subject import Subject

Process = subprocess.Popen[str]
AS_INSTALLED = ("-c", "from service.cli import main; main()")


@dataclass(frozen=True)
class Running:
    """A service with one tenant."""

    url: str
    ops_url: str
    pid: int
    key: str

    def cpu_seconds(self) -> float:
        """What it and its child processes have computed so far."""
        first = psutil.Process(self.pid)
        times = [process.cpu_times() for process in (first, *first.children(recursive=True))]
        return sum(one.user + one.system for one in times)


@contextmanager
def running_service(subject: Subject, plan: Plan) -> Iterator[Running]:
    """On the bench's checkpoint, with no data but a new tenant, and without training."""
    admin_key = secrets.token_urlsafe(32)
    with (
        tempfile.TemporaryDirectory(prefix="rootstock-bench-") as directory,
        started_service(subject, plan, Path(directory), ["--no-training"], admin_key) as (url, ops_url, pid),
    ):
        answer = httpx.post(
            f"{url}/admin/tenants", json={"name": "bench"}, headers={"authorization": f"Bearer {admin_key}"}
        )
        yield Running(url, ops_url, pid, answer.raise_for_status().json()["api_key"])


@contextmanager
def started_service(
    subject: Subject,
    plan: Plan,
    data_dir: Path,
    options: Sequence[str],
    admin_key: str,
    program: Sequence[str] = AS_INSTALLED,
) -> Iterator[tuple[str, str, int]]:
    """`rootstock serve` on the bench's checkpoint; its URLs, of the API and of operations, and its process."""
    command = [sys.executable, *program, "serve", "--port", "0"]
    command += ["--ops-port", "0", "--base", str(subject.directory), "--base-name", "bench"]
    command += ["--data-dir", str(data_dir), "--log-level", "error", "--max-num-seqs", str(plan.num_rows)]
    command += ["--prefix-cache", "off", "--kv-cache-bytes", str(kv_bytes(subject.base, plan.num_rows)), *options]
    environment = os.environ | {"ROOTSTOCK_ADMIN_KEY": admin_key, "HF_HUB_OFFLINE": "1"}
    with _process(command, environment) as process:
        yield (*_announced_urls(process), process.pid)


@contextmanager
def running_clients() -> Iterator[Process]:
    """`bench.clients`, for `converse`."""
    with _process([sys.executable, "-m", "bench.clients"], dict(os.environ)) as process:
        yield process


def converse(clients: Process, service: Running, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Send all bodies at once as chat requests; what `bench.clients` says about their answers."""
    assert clients.stdin is not None and clients.stdout is not None
    order = {"url": f"{service.url}/chat/completions", "key": service.key, "bodies": bodies}
    clients.stdin.write(json.dumps(order) + "\n")
    clients.stdin.flush()
    line = clients.stdout.readline()
    if not line:
        raise RuntimeError("the clients ended; their message is above")
    answer: dict[str, Any] = json.loads(line)
    return answer


def chat_body(model: str, content: str, num_tokens: int) -> dict[str, Any]:
    """One streamed question that is answered with exactly so many tokens."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@contextmanager
def _process(command: list[str], environment: dict[str, str]) -> Iterator[Process]:
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


def _announced_urls(process: Process) -> tuple[str, str]:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"API (http://\S+/v1), operations (http://\S+)", line):
            return found[1], found[2]
    raise RuntimeError("the service did not start; its message is above")
