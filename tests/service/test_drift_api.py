"""/v1/drift over HTTP, with monitors whose alarms a test decides; and what a scrape shows of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from service.config import Settings, SettingsError, load_settings
from service.drift_monitors import Monitors
from service.drift_prompt import drift_basis
from service.drift_states import SIGNALS
from service.engine.sequence import FinishReason
from tests.fakes import FakeBase
from tests.service.drift_fixtures import DIGEST, WINDOW, FakeMonitors, FakeReference
from tests.service.http_fixtures import Served, serve_fake


@pytest.fixture
def drifting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Served, FakeMonitors]]:
    """The service; `acme` and `zenith` each have a model of the adapter DIGEST."""
    monkeypatch.setattr("adapters.store.AdapterStore.read", lambda self, digest, names: Path(digest))
    monitors = FakeMonitors(references={DIGEST: FakeReference(basis=drift_basis(FakeBase()))})
    with serve_fake(tmp_path, monitors=cast(Monitors, monitors)) as served:
        served.engine.num_waiting = 0
        for tenant in (served.control.acme, served.control.zenith):
            served.control.publish(tenant, digest=DIGEST, suffix="tuned")
        yield served, monitors


def model_of(served: Served, *, zenith: bool = False) -> str:
    tenant = served.control.zenith if zenith else served.control.acme
    return served.control.registry.versions(tenant.id)[0].id


def ask(client: httpx.Client, model: str, number: int, *, length: int = 1, **fields: Any) -> httpx.Response:
    content = f"{number} " + "x" * length
    body = {"model": model, "messages": [{"role": "user", "content": content}], **fields}
    return client.post("/v1/chat/completions", json=body).raise_for_status()


def settle(served: Served) -> None:
    drift = served.drift
    assert drift is not None
    served.wait_until(lambda: drift.is_quiet)


def fill(served: Served, client: httpx.Client, model: str, numbers: range, *, length: int = 1) -> None:
    for number in numbers:
        ask(client, model, number, length=length)
        settle(served)


def signal(body: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in body["signals"] if one["signal"] == name]
    return cast(dict[str, Any], found)


def test_one_tenant_drifts_and_sees_it_while_another_sees_its_own(drifting: tuple[Served, FakeMonitors]) -> None:
    served, _ = drifting
    acme, zenith = served.http(), served.http(served.control.zenith_key)
    fill(served, acme, model_of(served), range(WINDOW), length=150)
    fill(served, zenith, model_of(served, zenith=True), range(WINDOW))
    (mine,) = acme.get("/v1/drift").json()["data"]
    (theirs,) = zenith.get("/v1/drift").json()["data"]
    assert (mine["state"], theirs["state"], mine["reference"], mine["samples"]) == ("drift", "ok", "ok", WINDOW)
    one = acme.get(f"/v1/drift/{model_of(served)}").json()
    assert one == mine and [found["signal"] for found in one["signals"]] == list(SIGNALS)
    length = signal(one, "prompt_length")
    assert length["state"] == "drift" and length["ratio"] == pytest.approx(length["statistic"] / length["threshold"])
    unknown = signal(one, "answer_nll")
    assert {unknown[name] for name in ("statistic", "threshold", "ratio", "since", "acknowledged")} == {None}
    assert zenith.get(f"/v1/drift/{model_of(served)}").status_code == 404, "somebody else's model"


def test_what_the_engine_measured_reaches_the_monitor_streamed_or_not(drifting: tuple[Served, FakeMonitors]) -> None:
    served, monitors = drifting
    acme, model = served.http(), model_of(served)
    ask(acme, model, 1)
    ask(acme, model, 2, stream=True)
    acme.post("/v1/completions", json={"model": model, "prompt": "Once upon", "stream": True}).raise_for_status()
    served.wait_until(lambda: len(monitors.seen) == 3)
    assert [values["answer_nll"] for values in monitors.seen] == [0.5] * 3
    assert {values["answer_entropy"] for values in monitors.seen} == {1.5}
    assert [request.measure for request in served.engine.requests if not request.pooling] == [True] * 3


def test_only_first_turns_of_adapters_are_watched_once_for_each_request(
    drifting: tuple[Served, FakeMonitors],
) -> None:
    served, monitors = drifting
    acme, model = served.http(), model_of(served)
    ask(acme, "tiny", 1)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    acme.post("/v1/chat/completions", json={"model": model, "messages": turns}).raise_for_status()
    ask(acme, model, 2, n=3)
    acme.post("/v1/completions", json={"model": model, "prompt": ["one", "two"]}).raise_for_status()
    served.wait_until(lambda: len(monitors.seen) == 2)
    settle(served)
    assert len(monitors.seen) == 2
    measured = [request.measure for request in served.engine.requests if not request.pooling]
    assert measured.count(True) == 2


def test_answers_asked_for_as_json_are_judged_as_such(drifting: tuple[Served, FakeMonitors]) -> None:
    served, monitors = drifting
    acme, model = served.http(), model_of(served)
    served.engine.pieces = ('{"a"', ": 1}")
    ask(acme, model, 1)
    settle(served)
    assert monitors.seen[-1]["valid_json"] is None
    from service.api.schemas import ChatRequest

    asked = {"model": model, "messages": [{"role": "user", "content": "a"}]}
    for shape, expected in (
        ({}, False),
        ({"response_format": {"type": "text"}}, False),
        ({"response_format": {"type": "json_object"}}, True),
        ({"structured_outputs": {"json": {"type": "object"}}}, True),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, False),
    ):
        assert ChatRequest.model_validate({**asked, **shape}).expects_json is expected


def test_an_answer_that_fails_is_not_looked_at(drifting: tuple[Served, FakeMonitors]) -> None:
    served, monitors = drifting
    served.engine.fails_after = 1
    body = {"model": model_of(served), "messages": [{"role": "user", "content": "a"}]}
    assert served.http().post("/v1/chat/completions", json=body).status_code == 500
    settle(served)
    assert monitors.seen == []


def test_a_watch_that_breaks_costs_no_request(drifting: tuple[Served, FakeMonitors]) -> None:
    served, monitors = drifting
    monitors.failing = True
    assert ask(served.http(), model_of(served), 1).json()["choices"][0]["finish_reason"] == FinishReason.STOP
    served.wait_until(lambda: "rootstock_drift_failures_total 1.0" in served.scrape())


def test_an_acknowledgement_says_who_and_why_and_is_an_event(drifting: tuple[Served, FakeMonitors]) -> None:
    served, _ = drifting
    acme, model = served.http(), model_of(served)
    fill(served, acme, model, range(WINDOW), length=150)
    sent = {"signal": "prompt_length", "note": "a new campaign"}
    answered = acme.post(f"/v1/drift/{model}/acknowledge", json=sent).json()
    given = signal(answered, "prompt_length")["acknowledged"]
    assert (given["by"], given["note"]) == (served.control.acme_key.split("-")[1], "a new campaign")
    assert signal(answered, "prompt_length")["state"] == "insufficient_data"
    page = acme.get("/v1/drift_events", params={"limit": 1}).json()
    (newest,) = page["data"]
    assert (newest["type"], newest["previous"], newest["state"], page["has_more"]) == (
        "acknowledgement",
        "drift",
        "insufficient_data",
        True,
    )
    rest = acme.get("/v1/drift_events", params={"after": newest["id"], "model": model}).json()["data"]
    assert [(one["signal"], one["state"], one["type"]) for one in rest] == [
        ("prompt_length", "drift", "state"),
        ("refusal", "ok", "state"),
    ]
    assert served.http(served.control.zenith_key).get("/v1/drift_events").json()["data"] == []


def test_a_model_that_was_never_asked_has_nothing_to_show_yet(drifting: tuple[Served, FakeMonitors]) -> None:
    served, _ = drifting
    shown = served.http().get(f"/v1/drift/{model_of(served)}").json()
    assert (shown["id"], shown["state"], shown["samples"], shown["last_seen_at"]) == (
        None,
        "insufficient_data",
        0,
        None,
    )
    served.control.registry.aliases.set(served.control.acme.id, "best", model_of(served))
    assert served.http().get("/v1/drift/best").json() == shown


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "param"),
    [
        ("GET", "/v1/drift/nobody", None, 404, "model_not_found", "model"),
        ("GET", "/v1/drift/tiny", None, 400, "drift_not_watched", "model"),
        ("GET", "/v1/drift?limit=0", None, 400, None, "limit"),
        ("GET", "/v1/drift?colour=red", None, 400, "unknown_parameter", "colour"),
        ("GET", "/v1/drift?after=drift-none", None, 400, None, "after"),
        ("GET", "/v1/drift_events?after=driftevent-none", None, 400, None, "after"),
        ("GET", "/v1/drift_events?model=nobody", None, 404, "model_not_found", "model"),
        ("POST", "/v1/drift/MODEL/acknowledge", {}, 400, "nothing_to_acknowledge", None),
        ("POST", "/v1/drift/MODEL/acknowledge", {"signal": "refusal"}, 400, "nothing_to_acknowledge", "signal"),
        ("POST", "/v1/drift/MODEL/acknowledge", {"signal": "mood"}, 400, None, "signal"),
        ("POST", "/v1/drift/MODEL/acknowledge", {"who": "me"}, 400, "unknown_parameter", "who"),
        ("POST", "/v1/drift/MODEL/acknowledge", {"note": ""}, 400, None, "note"),
        ("POST", "/v1/drift/nobody/acknowledge", {}, 404, "model_not_found", "model"),
    ],
)
def test_what_is_wrong_is_named(
    shared_drifting: Served, method: str, path: str, body: object, status: int, code: str | None, param: str | None
) -> None:
    served = shared_drifting
    answered = served.http().request(method, path.replace("MODEL", model_of(served)), json=body)
    error = answered.json()["error"]
    assert (answered.status_code, error["param"]) == (status, param), error
    assert code is None or error["code"] == code


@pytest.fixture(scope="module")
def shared_drifting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    monitors = cast(Monitors, FakeMonitors())
    with serve_fake(tmp_path_factory.mktemp("drift"), monitors=monitors) as served:
        served.control.publish(digest=DIGEST, suffix="tuned")
        yield served


def test_somebody_without_a_key_learns_nothing(shared_drifting: Served) -> None:
    assert httpx.get(f"{shared_drifting.url}/v1/drift").status_code == 401


def test_where_the_watch_is_off_it_says_so(shared_service: Served) -> None:
    answered = shared_service.http().get("/v1/drift")
    assert (answered.status_code, answered.json()["error"]["code"]) == (400, "drift_off")


def test_a_scrape_shows_the_worst_of_a_tenants_adapters_and_nothing_unknown(
    drifting: tuple[Served, FakeMonitors],
) -> None:
    served, _ = drifting
    acme, tenant = served.http(), served.control.acme.id
    second = served.control.publish(digest="e" * 64, suffix="second")
    fill(served, acme, model_of(served), range(1))  # `second` has come after, so this is the newest version: `second`
    fill(served, acme, second, range(100, 100 + WINDOW))
    first = served.control.registry.versions(tenant)[1].id
    fill(served, acme, first, range(WINDOW), length=150)
    text = served.scrape()
    assert f'rootstock_drift_state{{signal="prompt_length",state="drift",tenant="{tenant}"}} 1.0' in text
    assert f'rootstock_drift_state{{signal="refusal",state="ok",tenant="{tenant}"}} 1.0' in text
    assert f'rootstock_drift_state{{signal="answer_nll",state="insufficient_data",tenant="{tenant}"}} 1.0' in text
    assert f'rootstock_drift_samples{{tenant="{tenant}"}} {1.0 + 2 * WINDOW}' in text
    ratios = [line for line in text.splitlines() if line.startswith("rootstock_drift_statistic_ratio{")]
    assert len(ratios) == 2 and not any("answer_nll" in line or line.endswith(" 0.0") for line in ratios)
    assert 'rootstock_drift_alarms_total{signal="prompt_length"} 1.0' in text
    assert 'rootstock_drift_probes_total{outcome="measured"}' in text


def test_tenants_beyond_the_cap_share_one_label_and_a_deleted_one_has_none(
    drifting: tuple[Served, FakeMonitors],
) -> None:
    served, _ = drifting
    late, key = served.control.tenants.create("late")  # the third: two labels are taken
    served.control.publish(late, digest=DIGEST, suffix="tuned")
    acme, zenith, third = served.http(), served.http(served.control.zenith_key), served.http(key)
    for client, tenant in ((acme, served.control.acme), (zenith, served.control.zenith), (third, late)):
        fill(served, client, served.control.registry.versions(tenant.id)[0].id, range(WINDOW), length=150)
    text = served.scrape()
    assert 'rootstock_drift_samples{tenant="_other"} 4.0' in text and late.id not in text
    served.admin().delete(f"/v1/admin/tenants/{served.control.acme.id}").raise_for_status()
    assert f'tenant="{served.control.acme.id}"' not in served.scrape()


def test_deleting_a_model_ends_its_series(drifting: tuple[Served, FakeMonitors]) -> None:
    served, _ = drifting
    acme, model = served.http(), model_of(served)
    fill(served, acme, model, range(WINDOW))
    assert "rootstock_drift_samples{" in served.scrape()
    acme.delete(f"/v1/models/{model}").raise_for_status()
    assert "rootstock_drift_samples{" not in served.scrape()
    assert acme.get("/v1/drift").json()["data"] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"drift_webhook_url": "https://example.org/hook"},
        {"drift_webhook_secret": "long enough to be one"},
        {"drift_webhook_url": "ftp://example.org/", "drift_webhook_secret": "long enough to be one"},
        {"drift_webhook_url": "https:///hook", "drift_webhook_secret": "long enough to be one"},
        {"drift_webhook_url": "https://example.org/hook", "drift_webhook_secret": "short"},
        {"drift_run_length": 10},
    ],
)
def test_a_setting_of_drift_that_cannot_work_stops_the_start_and_tells_no_secret(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(wrong, environ={})
    assert "drift" in str(caught.value) and "long enough" not in str(caught.value)


def test_the_webhooks_url_is_not_shown_where_settings_are() -> None:
    settings = Settings(drift_webhook_url="https://example.org/?token=t0ken", drift_webhook_secret="s" * 16)
    assert "t0ken" not in repr(settings) and "ssss" not in repr(settings)
