"""Sends a case over a socket and looks at what came back, and at what it left behind. Knows no case."""

from __future__ import annotations

import http.client
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
import structlog

from service.tables import metadata
from tests.hostile.cases import Case, Request
from tests.service.http_fixtures import ADMIN_KEY
from tests.service.real_service import RealService

SETTLE_SECONDS = 3.0
NOT_A_TRACE = ("Traceback", 'File "/', '.py", line', "site-packages", "sqlalchemy", "psycopg")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Remains:
    """What a request could leave behind."""

    rows: dict[str, int]
    files: frozenset[str]
    temporary: frozenset[str]
    num_descriptors: int


@dataclass(frozen=True)
class Target:
    """The service under attack. `names` are what cases may mention: `{file}`, `{model}`, `{other_file}`, …"""

    service: RealService
    directory: Path
    names: dict[str, str]

    def attack(self, case: Case, log: pytest.LogCaptureFixture) -> None:
        """Fails unless the service answers as it should and is as it was."""
        before = self.remains()
        with captured_events() as events:
            answer = self.send(case.request)
            self._check(case, answer)
            if answer.status >= 400:
                self._leaves_nothing(before)
            self.is_well()
        troubles = [event for event in events if event["log_level"] in ("error", "critical", "exception")]
        assert not troubles, "the log tells of trouble"
        assert not [record for record in log.records if record.exc_info], "the log has a traceback"

    def send(self, request: Request) -> Answer:
        address = urlsplit(self.service.url)
        with socket.create_connection((address.hostname, address.port), timeout=60) as sock:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has answered already
                sock.sendall(self.bytes_of(request))
            response = http.client.HTTPResponse(sock, method=request.method)
            response.begin()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def bytes_of(self, request: Request) -> bytes:
        if request.raw is not None:
            return self._filled(request.raw)
        body = self._filled(request.body)
        lines = [f"{request.method} {self._filled(request.path.encode()).decode()} HTTP/1.1".encode(), b"host: service"]
        lines += [name.encode() + b": " + self._filled(value) for name, value in request.headers]
        if request.authorized:
            lines.append(b"authorization: Bearer " + (ADMIN_KEY if request.admin else self.service.key).encode())
        if not any(name == "transfer-encoding" for name, _ in request.headers):
            length = str(len(body)).encode() if request.length is None else request.length
            lines.append(b"content-length: " + length)
        return b"\r\n".join([*lines, b"connection: close", b"", body])

    def is_well(self) -> None:
        """An honest request is answered by a living engine in which nothing is left running."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        honest = Request(body=json.dumps(body).encode(), headers=[("content-type", b"application/json")])
        assert self.send(honest).status == 200
        deadline = time.monotonic() + SETTLE_SECONDS
        while (stats := self.service.engine.stats()).num_running or stats.num_waiting:
            assert time.monotonic() < deadline, "a sequence goes on for nobody"
            time.sleep(0.005)

    def remains(self) -> Remains:
        with self.service.control.database.read() as connection:
            rows = {
                table.name: connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
                for table in metadata.sorted_tables
                if table.name != "completions"  # of honest requests, written when there is time
            }
        kept = (path for path in self.directory.rglob("*") if path.is_file() and ".db" not in path.name)
        temporary = frozenset(os.listdir(tempfile.gettempdir()))
        return Remains(rows, frozenset(map(str, kept)), temporary, _num_descriptors())

    def _leaves_nothing(self, before: Remains) -> None:
        """Connections may take a moment to close."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while (after := self.remains()) != before:
            same = after.rows == before.rows and after.files == before.files and after.temporary <= before.temporary
            if same and after.num_descriptors <= before.num_descriptors:
                return
            assert time.monotonic() < deadline, f"left behind: {before} became {after}"
            time.sleep(0.02)

    def _check(self, case: Case, answer: Answer) -> None:
        text = answer.body.decode(errors="replace")
        assert answer.status == case.status, text[:500]
        assert not [trace for trace in NOT_A_TRACE if trace in text], text[:500]
        assert case.says in text, text[:500]
        if answer.status >= 400 and case.request.method != "HEAD":
            error: dict[str, Any] = json.loads(answer.body)["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["message"] and len(text) < 4096, "an answer is no echo of all that was sent"
            assert error["param"] == case.param, text[:500]
        elif case.shows:
            assert case.shows.items() <= json.loads(answer.body).items(), text[:500]

    def _filled(self, text: bytes) -> bytes:
        for name, value in self.names.items():
            text = text.replace(b"{" + name.encode() + b"}", value.encode())
        return text


def _num_descriptors() -> int:
    """Open sockets and files; each thread that reads the database keeps a connection of its own to it."""
    targets = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            targets.append(os.readlink(f"/proc/self/fd/{name}"))
    return sum(".db" not in target for target in targets)


@contextmanager
def captured_events() -> Iterator[list[dict[str, Any]]]:
    with structlog.testing.capture_logs() as events:
        yield events  # type: ignore[misc]
