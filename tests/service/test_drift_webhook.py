"""Events posted to a real HTTP server on this machine."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import pytest
import structlog

from service.drift_events import DriftEvent
from service.drift_monitors import Monitors
from service.drift_states import DriftState
from service.drift_webhook import MAX_ATTEMPTS, MAX_WAITING, DriftWebhook
from tests.service.drift_fixtures import DIGEST, WINDOW, FakeMonitors, wait_until
from tests.service.http_fixtures import serve_fake

SECRET = b"a secret of the operator's"


@dataclass
class Receiver:
    """Answers with `statuses`, the last one for ever."""

    statuses: list[int] = field(default_factory=lambda: [200])
    heard: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def answer(self, headers: dict[str, str], body: bytes) -> int:
        self.hold.wait(10)
        self.heard.append((headers, body))
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    receiver = Receiver()
    receiver.hold.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status = receiver.answer({name.lower(): value for name, value in self.headers.items()}, body)
            self.send_response(status)
            self.send_header("location", "http://127.0.0.1:9/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    receiver.url = f"http://127.0.0.1:{server.server_port}/hook?token=t0ken"
    yield receiver
    receiver.hold.set()
    server.shutdown()
    server.server_close()
    thread.join()


def event(signal: str = "refusal") -> DriftEvent:
    return DriftEvent(
        "tenant-a", "ft:x", "d" * 64, signal, DriftState.DRIFT, DriftState.OK, 12.0, 10.0, 300, 1_700_000_000.0
    )


class Hook:
    def __init__(self, url: str) -> None:
        self.ended: list[str] = []
        self.webhook = DriftWebhook(url, SECRET, self.ended.append, first_delay_seconds=0.01)
        self.webhook.start()

    def __enter__(self) -> Hook:
        return self

    def __exit__(self, *_: object) -> None:
        self.webhook.stop()


def test_an_event_arrives_whole_and_its_signature_holds(receiver: Receiver) -> None:
    with Hook(receiver.url) as hook:
        hook.webhook(event())
        wait_until(lambda: hook.ended == ["delivered"])
    ((headers, body),) = receiver.heard
    told = json.loads(body)
    assert (told["tenant"], told["signal"], told["state"], told["object"]) == (
        "tenant-a",
        "refusal",
        "drift",
        "drift.event",
    )
    assert headers["content-type"] == "application/json" and headers["x-rootstock-event"] == told["id"]
    at, mac = (part.split("=")[1] for part in headers["x-rootstock-signature"].split(","))
    assert abs(int(at) - time.time()) < 60
    assert hmac.compare_digest(mac, hmac.new(SECRET, f"{at}.".encode() + body, hashlib.sha256).hexdigest())


def test_a_receiver_that_fails_for_a_while_gets_it_in_the_end_and_the_order_stays(receiver: Receiver) -> None:
    receiver.statuses = [500, 503, 204, 200]
    with Hook(receiver.url) as hook:
        for signal in ("refusal", "answer_nll"):
            hook.webhook(event(signal))
        wait_until(lambda: hook.ended == ["delivered", "delivered"])
    assert [json.loads(body)["signal"] for _, body in receiver.heard] == ["refusal"] * 3 + ["answer_nll"]


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, 302])
def test_a_receiver_that_never_takes_it_is_given_up_and_redirects_are_not_followed(
    receiver: Receiver, status: int
) -> None:
    receiver.statuses = [status]
    with Hook(receiver.url) as hook:
        hook.webhook(event())
        wait_until(lambda: hook.ended == ["failed"])
    assert len(receiver.heard) == MAX_ATTEMPTS


@pytest.mark.slow
def test_nobody_there_is_a_failure_and_not_a_crash() -> None:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    with Hook("http://127.0.0.1:9/") as hook:
        for _ in range(2):
            hook.webhook(event())
        wait_until(lambda: hook.ended == ["failed", "failed"])


def test_a_slow_receiver_holds_nobody_up_and_what_does_not_fit_is_dropped(receiver: Receiver) -> None:
    receiver.hold.clear()
    with Hook(receiver.url) as hook:
        start = time.perf_counter()
        for _ in range(MAX_WAITING + 50):
            hook.webhook(event())
        assert time.perf_counter() - start < 1.0
        assert 48 <= hook.ended.count("dropped") <= 50
        receiver.hold.set()


def test_stopping_does_not_wait_for_what_is_left(receiver: Receiver) -> None:
    receiver.statuses = [500]
    hook = Hook(receiver.url)
    for _ in range(100):
        hook.webhook(event())
    start = time.perf_counter()
    hook.webhook.stop()
    assert time.perf_counter() - start < 5.0


def test_the_service_posts_what_happens_to_a_tenant(receiver: Receiver, tmp_path: Path) -> None:
    chosen = {"drift_webhook_url": receiver.url, "drift_webhook_secret": SECRET.decode()}
    with serve_fake(tmp_path, monitors=cast(Monitors, FakeMonitors(references={})), **chosen) as served:
        model = served.control.publish(digest=DIGEST, suffix="tuned")
        served.engine.pieces = ("I'm sorry, I cannot help with that.",)
        for number in range(WINDOW):
            body = {"model": model, "messages": [{"role": "user", "content": f"number {number}"}]}
            served.http().post("/v1/chat/completions", json=body).raise_for_status()
        served.wait_until(lambda: bool(receiver.heard))
        told = json.loads(receiver.heard[0][1])
        assert (told["tenant"], told["signal"], told["state"]) == (served.control.acme.id, "refusal", "drift")
        served.wait_until(lambda: 'rootstock_drift_webhooks_total{outcome="delivered"} 1.0' in served.scrape())
