"""Starts a real, small Prometheus for tests, and finds promtool: in PROMETHEUS_BIN_DIR or on the PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import create_server
from typing import Any

import httpx
import pytest
import yaml


def binary(name: str) -> Path:
    """Skips the test where there is none."""
    directory = os.environ.get("PROMETHEUS_BIN_DIR")
    found = shutil.which(name, path=directory) if directory else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name} on the PATH or in PROMETHEUS_BIN_DIR (Debian: apt-get install prometheus)")
    return Path(found)


@dataclass(frozen=True)
class Prometheus:
    """A scraping one, asked over its HTTP API."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of the answer; an error of Prometheus' is an AssertionError with its words."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.get("query", query=expr)["result"]
        return result


@contextmanager
def prometheus_scraping(target: str, rules: Path, directory: Path, job: str = "rootstock") -> Iterator[Prometheus]:
    """Scrapes `target` (host:port) and evaluates `rules`, both each second, until the block ends; then it is killed."""
    command = binary("prometheus")
    scraping = {"job_name": job, "static_configs": [{"targets": [target]}]}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(_quick(rules, directory))],
        "scrape_configs": [scraping],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    with create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    options = [
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
        "--query.max-concurrency=2",
    ]
    environment = {**os.environ, "GOMAXPROCS": "1", "GOMEMLIMIT": "200MiB"}
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([command, *options], env=environment, stdout=log, stderr=log)
    prometheus = Prometheus(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + 60
        while not _ready(prometheus):
            assert process.poll() is None and time.monotonic() < deadline, (directory / "prometheus.log").read_text()
            time.sleep(0.1)
        yield prometheus
    finally:
        process.kill()
        process.wait()


def _quick(rules: Path, directory: Path) -> Path:
    """The same rules without intervals of their own: a test has no two minutes for the slow group."""
    groups = yaml.safe_load(rules.read_text())["groups"]
    for group in groups:
        group.pop("interval", None)
    path = directory / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": groups}))
    return path


def _ready(prometheus: Prometheus) -> bool:
    try:
        return httpx.get(f"{prometheus.url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False
