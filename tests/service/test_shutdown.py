"""`rootstock serve`, asked to stop at any moment: what becomes of answers, uploads and jobs, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.running_service import Running, rootstock_serve
from tests.service.tuning_fixtures import medlars

pytestmark = pytest.mark.slow

BOTH = pytest.mark.parametrize("engine_process", [True, False], ids=["own process", "threads"])
LONG_JOB = {"n_epochs": 50, "batch_size": 4, "learning_rate": 5e-3, "lora_r": 8}
GRACE_SECONDS = 45.0
"""What these settings promise (a drain of none, 15 s to stop), on a machine that does much else."""


def log_of(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@contextmanager
def upload_under_way(running: Running, key: str) -> Iterator[socket.socket]:
    """A request that is being answered until its last bytes come."""
    address = urlsplit(running.url)
    assert address.hostname is not None and address.port is not None
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
        connection.sendall(f"{head}content-type: application/json\r\ncontent-length: 2\r\n\r\n{{".encode())
        time.sleep(0.5)
        yield connection


@BOTH
def test_a_signal_while_the_base_is_loading_ends_the_process_with_status_0(
    tiny_llama_dir: Path, tmp_path: Path, engine_process: bool
) -> None:
    with rootstock_serve(tiny_llama_dir, tmp_path, wait=False, engine_process=engine_process) as running:
        running.wait_until(lambda: running.probe("livez") == 200)
        assert running.probe("readyz") == 503
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(GRACE_SECONDS) == 0
    events = [line["event"] for line in log_of(tmp_path)]
    assert "service_stopped_while_loading" in events and "service_started" not in events
    assert "Traceback" not in (tmp_path / "log").read_text()


@BOTH
def test_when_the_time_is_up_streams_end_with_an_error_and_jobs_are_saved_and_released(
    tiny_llama_dir: Path, tmp_path: Path, engine_process: bool
) -> None:
    options: dict[str, Any] = {"engine_process": engine_process, "drain_seconds": 0, "lease_seconds": 300}
    with rootstock_serve(tiny_llama_dir, tmp_path, **options) as running, running.client() as client:
        (model,) = (each.id for each in client.models.list())
        rows = b"\n".join(json.dumps(row).encode() for row in medlars(64))
        file = client.files.create(file=("medlars.jsonl", rows), purpose="fine-tune")
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": LONG_JOB}}
        job = client.fine_tuning.jobs.create(model=model, training_file=file.id, seed=1, method=method)
        running.wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).trained_tokens)
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "How many?"}],
            max_tokens=450,
            n=4,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        running.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert running.process.wait(GRACE_SECONDS) == 0
    with sqlite3.connect(tmp_path / "rootstock.db") as database:
        (row,) = database.execute("SELECT state, resume_point IS NOT NULL, attempt, worker FROM jobs").fetchall()
    assert row == ("queued", 1, 1, None)
    lines = log_of(tmp_path)
    assert [line["outcome"] for line in lines if line["event"] == "tuning.run_finished"] == ["shutdown"]
    assert lines[-1]["event"] == "service_stopped" and lines[-1]["left_behind"] == []


def test_while_the_service_drains_new_requests_are_refused_and_those_under_way_are_answered(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with rootstock_serve(tiny_llama_dir, tmp_path, drain_seconds=60) as running, running.client() as client:
        with upload_under_way(running, client.api_key) as connection:
            running.process.send_signal(signal.SIGTERM)
            running.wait_until(lambda: running.probe("readyz") == 503, 5)
            refused = httpx.get(f"{running.url}/v1/models", headers={"authorization": f"Bearer {client.api_key}"})
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == "draining" and refused.headers["connection"] == "close"
            assert running.probe("livez") == 200 and running.process.poll() is None
            connection.sendall(b"}")
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
        assert running.process.wait(GRACE_SECONDS) == 0


@BOTH
def test_a_second_signal_does_not_wait_for_anybody(tiny_llama_dir: Path, tmp_path: Path, engine_process: bool) -> None:
    options: dict[str, Any] = {"drain_seconds": 600, "engine_process": engine_process}
    with (
        rootstock_serve(tiny_llama_dir, tmp_path, **options) as running,
        running.client() as client,
        upload_under_way(running, client.api_key),
    ):
        running.process.send_signal(signal.SIGTERM)
        running.wait_until(lambda: running.probe("readyz") == 503, 5)
        time.sleep(0.5)
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(GRACE_SECONDS) == 0


def test_liveness_follows_the_engines_progress_not_that_of_http(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with rootstock_serve(tiny_llama_dir, tmp_path, stall_seconds=3) as running:
        engine = engine_pid(running.process.pid)
        os.kill(engine, signal.SIGSTOP)
        try:
            running.wait_until(lambda: running.probe("livez") == 503, 60)
            assert running.probe("readyz") == 503
            assert httpx.get(f"{running.url}/v1/models").status_code == 401, "HTTP itself is well"
        finally:
            os.kill(engine, signal.SIGCONT)
        running.wait_until(lambda: running.probe("livez") == running.probe("readyz") == 200, 60)


def engine_pid(service: int) -> int:
    (found,) = (
        int(child)
        for children in Path(f"/proc/{service}/task").glob("*/children")
        for child in children.read_text().split()
        if b"service.engine_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    return found
