"""An engine that crashes under a running service, seen by its clients and by the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from service.engine.base_model import load_base_model
from service.engine.plan import Plan
from service.engine.runner import Runner
from tests.service.real_service import RealService, serve_real
from tests.service.test_chat import MESSAGES


@pytest.fixture
def service(tiny_llama_dir: Path, tmp_path: Path) -> Iterator[RealService]:
    with serve_real(load_base_model(str(tiny_llama_dir), quantization="none"), tmp_path) as running:
        yield running


def probes(service: RealService) -> tuple[int, int]:
    """What /livez and /readyz answer."""
    live, ready = (httpx.get(f"{service.ops_url}/{path}").status_code for path in ("livez", "readyz"))
    return live, ready


def endless(client: openai.OpenAI) -> openai.Stream[openai.types.chat.ChatCompletionChunk]:
    return client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, max_tokens=400, extra_body={"ignore_eos": True}
    )


def test_a_crash_ends_running_streams_with_an_error_and_the_next_request_is_answered(service: RealService) -> None:
    client = service.client(strict=False)
    expected = client.chat.completions.create(model=service.tuned, messages=MESSAGES, temperature=0, max_tokens=8)
    assert probes(service) == (200, 200)
    stream = endless(client)
    next(iter(stream))
    service.engine._machinery.residency.cache._slabs.clear()  # the next row that grows or goes back cannot be found
    with pytest.raises(openai.APIError, match="restarting"):
        list(stream)
    again = client.chat.completions.create(model=service.tuned, messages=MESSAGES, temperature=0, max_tokens=8)
    assert again.choices[0].message.content == expected.choices[0].message.content
    assert probes(service) == (200, 200)
    assert "rootstock_engine_restarts_total 1.0" in httpx.get(f"{service.ops_url}/metrics").text


def test_an_engine_that_cannot_compute_any_more_asks_for_a_new_process(
    service: RealService, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = service.client(strict=False)
    client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)

    def fail(runner: Runner, plan: Plan, *args: object) -> object:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(Runner, "run", fail)
    with pytest.raises(openai.InternalServerError) as failure:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
    assert "fire" not in failure.value.message
    service.engine._thread.join(20)
    assert probes(service) == (503, 503)
    with pytest.raises(openai.APIStatusError) as refusal:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
    assert refusal.value.status_code == 503 and refusal.value.response.headers["retry-after"] == "5"
