"""A Prometheus of the walk's own with the project's rules, and what the dashboard would ask it. Knows no tenant."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import create_server
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import yaml

from tools.monitoring.grafana import Panel
from tools.monitoring.tenants_dashboard import TENANTS_DASHBOARD

PLAIN = Path(__file__).resolve().parents[2] / "k8s" / "monitoring" / "plain"
SCRAPE_SECONDS = 2
START_SECONDS = 60.0
EVERYTHING = {"$__rate_interval": "1m", "$__range": "15m", "$job": ".*", "$tenant": ".*", "$signal": ".*"}
"""What a dashboard's variables stand for while nothing is chosen."""


class PrometheusError(Exception):
    """There is none, it did not start, or it did not understand a query."""


@dataclass(frozen=True)
class Prometheus:
    """A running one, asked over its HTTP API."""

    url: str

    async def get(self, path: str, **parameters: str) -> Any:
        """`data` of the answer. Raises PrometheusError with Prometheus' words."""
        async with httpx.AsyncClient(base_url=f"{self.url}/api/v1", trust_env=False) as client:
            answer = (await client.get(path, params=parameters)).json()
        if answer["status"] != "success":
            raise PrometheusError(f"{parameters}: {answer.get('error')}")
        return answer["data"]

    async def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of every series."""
        found = (await self.get("query", query=expr))["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]

    async def alerts(self) -> list[dict[str, Any]]:
        """Pending and firing."""
        listed: list[dict[str, Any]] = (await self.get("alerts"))["alerts"]
        return listed

    async def panels(self) -> AsyncIterator[tuple[Panel, list[tuple[str, float]]]]:
        """Each panel of "tenants and drift", and the name and newest value of every line or cell in it."""
        for panel in _panels():
            shown: list[tuple[str, float]] = []
            for query in panel.queries:
                shown += [(_name(query.legend, labels), value) for labels, value in await self.query(_all(query.expr))]
            yield panel, shown


@asynccontextmanager
async def running_prometheus(target: str, hold_seconds: int | None) -> AsyncIterator[Prometheus]:
    """Scrapes `target` (host:port) and evaluates the project's rules, both every SCRAPE_SECONDS. An alert is pending
    for `hold_seconds` at most; None: as long as its rule says. Raises PrometheusError."""
    binary = shutil.which("prometheus", path=os.environ.get("PROMETHEUS_BIN_DIR"))
    if binary is None:
        raise PrometheusError(
            "prometheus is neither on the PATH nor in PROMETHEUS_BIN_DIR (Debian: apt-get install it)"
        )
    with TemporaryDirectory(prefix="rootstock-prometheus-") as name:
        directory = Path(name)
        with create_server(("127.0.0.1", 0)) as sock:
            address = f"127.0.0.1:{sock.getsockname()[1]}"
        with (directory / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(binary, f"--config.file={_configure(directory, target, hold_seconds)}"),
                *(f"--storage.tsdb.path={directory / 'tsdb'}", f"--web.listen-address={address}"),
                stdout=log,
                stderr=log,
            )
        prometheus = Prometheus(f"http://{address}")
        try:
            await _wait_until_ready(prometheus, process, directory / "log")
            yield prometheus
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


def _configure(directory: Path, target: str, hold_seconds: int | None) -> Path:
    """The plain configuration with our target and without Alertmanager; the rules without their slower intervals."""
    rules = yaml.safe_load((PLAIN / "rootstock.rules.yml").read_text())
    for group in rules["groups"]:
        group.pop("interval", None)
        for rule in group["rules"] if hold_seconds is not None else ():
            if "for" in rule:
                rule["for"] = f"{hold_seconds}s"
    (directory / "rootstock.rules.yml").write_text(yaml.safe_dump(rules))
    config = yaml.safe_load((PLAIN / "prometheus.yml").read_text())
    del config["alerting"]
    config["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), f"{SCRAPE_SECONDS}s")
    (scraping,) = config["scrape_configs"]
    scraping["static_configs"] = [{"targets": [target]}]
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


async def _wait_until_ready(prometheus: Prometheus, process: asyncio.subprocess.Process, log: Path) -> None:
    deadline = asyncio.get_running_loop().time() + START_SECONDS
    async with httpx.AsyncClient(trust_env=False) as client:
        while asyncio.get_running_loop().time() < deadline and process.returncode is None:
            try:
                if (await client.get(f"{prometheus.url}/-/ready")).is_success:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            await asyncio.sleep(0.2)
    raise PrometheusError(f"prometheus did not start\n{log.read_text(errors='replace')[-2000:]}")


def _panels() -> Iterator[Panel]:
    for section in TENANTS_DASHBOARD.sections:
        yield from section.panels


def _all(expr: str) -> str:
    for variable, value in EVERYTHING.items():
        expr = expr.replace(variable, value)
    return expr


def _name(legend: str, labels: dict[str, str]) -> str:
    """As Grafana fills a legend; a cell of a table is its tenant's."""
    for label, value in labels.items():
        legend = legend.replace(f"{{{{{label}}}}}", value)
    return legend if labels.get("tenant", "") in legend else f"{labels['tenant']} {legend}"
