"""`rootstock serve` as a process of its own, on a real (tiny, random) base."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from socket import create_server
from typing import Any

import httpx
import pytest
from openai import APIError, APIStatusError

from tests.running_service import ADMIN_KEY, rootstock_serve


@pytest.mark.slow
def test_serve_answers_and_on_sigterm_finishes_the_running_stream_before_it_exits(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with rootstock_serve(tiny_llama_dir, tmp_path) as running, running.client() as client:
        (model,) = client.models.list().data
        same = [
            client.chat.completions.create(
                model=model.id, messages=[{"role": "user", "content": "How many?"}], seed=7, max_tokens=8
            )
            for _ in range(2)
        ]
        assert same[0].choices[0].message.content == same[1].choices[0].message.content
        stream = client.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": "How many adapters are resident?"}],
            max_tokens=400,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        running.process.send_signal(signal.SIGTERM)
        last = list(stream)[-1]
        assert last.usage is not None and last.usage.completion_tokens == 400
        assert running.process.wait(30) == 0
        log = (tmp_path / "log").read_text()
        assert '"event": "service_draining"' in log and '"event": "service_stopped"' in log
        assert "How many" not in log and ADMIN_KEY not in log and "Traceback" not in log


@pytest.mark.slow
def test_the_service_outlives_the_death_of_its_engine_process(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with rootstock_serve(tiny_llama_dir, tmp_path) as running, running.client() as client:
        (model,) = client.models.list().data
        asked: dict[str, Any] = {"model": model.id, "messages": [{"role": "user", "content": "How many?"}]}
        stream = client.chat.completions.create(**asked, max_tokens=450, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        os.kill(_engine_pid(running.process.pid), signal.SIGKILL)
        with pytest.raises(APIError, match="restarting"):
            list(stream)
        while running.ready():
            time.sleep(0.01)
        assert httpx.get(f"{running.ops_url}/livez").status_code == 200, "restarting the pod would not be quicker"
        with pytest.raises(APIStatusError) as refused:
            client.chat.completions.create(**asked)
        assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"]
        while not running.ready():
            time.sleep(0.05)
        assert client.chat.completions.create(**asked, max_tokens=4).usage is not None
        assert "rootstock_engine_restarts_total 1.0" in httpx.get(f"{running.ops_url}/metrics").text


def _engine_pid(service: int) -> int:
    """Of the one child that runs the engine."""
    (found,) = (
        int(child)
        for children in Path(f"/proc/{service}/task").glob("*/children")
        for child in children.read_text().split()
        if b"service.engine_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    return found


@pytest.mark.slow
def test_a_base_that_is_not_there_stops_start_up_with_a_message(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught, rootstock_serve(tmp_path / "nothing", tmp_path):
        pass
    assert "error:" in str(caught.value) and "nothing" in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.slow
def test_a_taken_port_stops_start_up_before_the_base_is_loaded(tmp_path: Path) -> None:
    with create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-c", "from service.cli import main; main()", "serve", f"--port={port}"]
        served = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60)
    assert served.returncode == 2
    assert f"port: cannot listen on 127.0.0.1:{port}: Address already in use" in served.stderr
