"""The ops port: scrapes, liveness by the engine's progress, readiness."""

from __future__ import annotations

import asyncio
import time
from typing import cast

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.engine.engine import Engine
from service.engine.errors import EngineDeadError
from service.health import Health
from tests.fakes import FakeEngine
from tests.service.http_fixtures import Served


def test_a_scrape_shows_what_the_api_did_and_who_asked(served: Served) -> None:
    served.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], n=2)
    with pytest.raises(Exception, match="missing"):
        served.client().chat.completions.create(model="missing", messages=[{"role": "user", "content": "x"}])
    served.wait_until(lambda: 'outcome="rejected"' in served.scrape())
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(served.scrape())
        for sample in family.samples
    }
    tenant = served.control.acme.id
    assert found["rootstock_requests_total", ("operation", "chat"), ("outcome", "success")] == 1
    assert found["rootstock_requests_total", ("operation", "chat"), ("outcome", "rejected")] == 1
    assert found["rootstock_tenant_requests_total", ("tenant", tenant)] == 2
    assert found["rootstock_time_to_first_token_seconds_count", ("operation", "chat")] == 2
    assert found["rootstock_tokens_total", ("type", "completion")] == 8
    assert found["rootstock_adapters_resident", ("tier", "host")] == 2
    assert ("rootstock_tenant_requests_total", ("tenant", tenant)) in found


def test_an_exemplar_carries_the_trace_id_the_caller_sent(served: Served) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    served.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        extra_headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"},
    )
    assert f'# {{trace_id="{trace_id}"}}' in served.scrape("application/openmetrics-text")


def test_removing_a_tenant_removes_its_series(served: Served) -> None:
    served.client(served.control.zenith_key).models.list()
    served.wait_until(lambda: served.control.zenith.id in served.scrape())
    served.admin().delete(f"/v1/admin/tenants/{served.control.zenith.id}").raise_for_status()
    assert served.control.zenith.id not in served.scrape()


def test_the_api_port_answers_no_metrics_and_the_ops_port_no_api(shared_service: Served) -> None:
    for path in ("/metrics", "/livez", "/readyz"):
        assert shared_service.http().get(path).status_code == 404
    assert httpx.get(f"{shared_service.ops_url}/v1/models").status_code == 404


def test_a_dead_engine_fails_liveness_and_readiness(served: Served) -> None:
    assert _status(served, "livez") == _status(served, "readyz") == 200
    served.engine.alive = False
    assert _status(served, "livez") == _status(served, "readyz") == 503
    assert "stopped" in httpx.get(f"{served.ops_url}/livez").json()["reason"]


def test_a_draining_service_is_alive_but_not_ready(served: Served) -> None:
    served.health.drain()
    assert _status(served, "livez") == 200
    assert httpx.get(f"{served.ops_url}/readyz").json() == {"status": "unavailable", "reason": "draining"}


def test_before_the_base_is_loaded_the_process_is_alive_but_not_ready() -> None:
    health = Health(60)
    assert health.trouble() is None and health.not_ready() == "the base is loading"


def test_an_engine_with_work_and_no_steps_is_in_trouble() -> None:
    now = 1000.0
    engine = FakeEngine(busy_since=900.0, last_step_at=995.0)
    health = Health(60, clock=lambda: now)
    health.watch(cast(Engine, engine))
    assert health.trouble() is None
    now = 1056.0
    assert "no step for 61 s" in (health.trouble() or "")
    engine.busy_since = 1050.0  # idle in between: the old step does not count against it
    assert health.trouble() is None


def test_readiness_wants_a_recent_forward_and_the_self_check_of_an_idle_engine_brings_one() -> None:
    engine = FakeEngine(last_step_at=None)
    health = Health(60)
    health.watch(cast(Engine, engine))
    assert health.not_ready() == "no successful forward in the last 60 s"
    asyncio.run(_check_until(health, lambda: engine.last_step_at is not None))
    assert health.not_ready() is None and health.trouble() is None
    (request,) = engine.requests
    assert (request.sampling.max_tokens, request.adapter) == (1, None)


def test_a_self_check_that_fails_leaves_the_service_unready_and_goes_on() -> None:
    engine = FakeEngine(last_step_at=time.monotonic() - 100, refusal=EngineDeadError("gone"))
    health = Health(60)
    health.watch(cast(Engine, engine))
    asyncio.run(_check_until(health, lambda: True))
    assert health.not_ready() == "no successful forward in the last 60 s"


async def _check_until(health: Health, done: object) -> None:
    checking = asyncio.create_task(health.keep_checking())
    for _ in range(50):
        await asyncio.sleep(0)
    assert callable(done) and done() and not checking.done()
    checking.cancel()


def _status(served: Served, path: str) -> int:
    return httpx.get(f"{served.ops_url}/{path}").status_code
