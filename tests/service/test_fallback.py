"""Damaged adapters: aliases fall back to a version that is whole, and are told of; nothing damaged is ever served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from service.audit import Audit
from service.caretaker import Scrubber
from service.fallback import Fallback
from service.registry import Registry
from tests.service.control_fixtures import BASE, Control
from tests.service.http_fixtures import Served
from tests.service.stored_adapters import Shelf


class Ear:
    """Every observer, remembering."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.failures: list[str] = []
        self.num_checked = 0
        self.checked_at: float | None = None

    def alias_fell_back(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def adapter_verify_failed(self, reason: str) -> None:
        self.failures.append(reason)

    def adapter_checked(self) -> None:
        self.num_checked += 1

    def store_checked(self, at: float) -> None:
        self.checked_at = at


@pytest.fixture
def shelf(control: Control, tmp_path: Path) -> Shelf:
    return Shelf(control, tmp_path)


@pytest.fixture
def ear() -> Ear:
    return Ear()


@pytest.fixture
def fallback(shelf: Shelf, ear: Ear) -> Fallback:
    return Fallback(shelf.control.database, shelf.control.registry, shelf.store, ear)


def test_an_alias_goes_back_to_its_nearest_whole_version_and_says_so(
    shelf: Shelf, fallback: Fallback, ear: Ear
) -> None:
    control, tenant = shelf.control, shelf.control.acme.id
    models = [shelf.version(name, alias="best") for name in ("first", "second", "third")]
    for _, digest in models[1:]:
        shelf.damage(digest)
    moved = fallback.away_from(models[2][1])
    assert [(one.alias, one.damaged, one.model) for one in moved] == [("best", models[2][0], models[0][0])]
    alias = control.registry.aliases.get(tenant, "best")
    assert (alias.model, alias.history[0].kind, alias.history[1].model) == (models[0][0], "fallback", models[2][0])
    route = control.registry.route(tenant, "best", lambda: "")
    assert (route.model.digest, route.fallen_from) == (models[0][1], models[2][0])
    assert ear.outcomes == ["moved"]
    entry = Audit(control.database).list(tenant_id=tenant).items[0]
    assert (entry.actor, entry.action, entry.details["model"]) == ("service", "alias.fallback", models[0][0])
    assert fallback.away_from(models[2][1]) == [], "it points there no more"
    control.registry.aliases.set(tenant, "best", models[1][0])
    assert control.registry.route(tenant, "best", lambda: "").fallen_from is None


def test_nothing_moves_for_a_whole_adapter_nor_to_one_of_another_base_or_without_bytes(
    shelf: Shelf, fallback: Fallback, ear: Ear
) -> None:
    control, tenant = shelf.control, shelf.control.acme.id
    _, first = shelf.version("first", alias="best")
    model, digest = shelf.version("second", alias="best")
    assert fallback.away_from(digest) == [] and ear.outcomes == []
    shelf.damage(digest)
    other = Registry(control.database, replace(BASE, fingerprint="another base's"))
    assert Fallback(control.database, other, shelf.store, ear).away_from(digest) == []
    shelf.store.delete(first)
    assert fallback.away_from(digest) == []
    assert ear.outcomes == ["nothing_to_fall_back_to"] * 2
    assert control.registry.aliases.get(tenant, "best").model == model


def test_the_scrubber_finds_a_flipped_byte_at_rest_and_what_is_missing(
    shelf: Shelf, fallback: Fallback, ear: Ear
) -> None:
    _, first = shelf.version("first", alias="best")
    _, second = shelf.version("second", alias="best")
    _, third = shelf.version("third")
    slept: list[float] = []
    scrubber = Scrubber(shelf.control.database, shelf.store, fallback, ear, bytes_per_second=10.0, sleep=slept.append)
    assert scrubber.scrub() == [] and ear.num_checked == 3 and ear.checked_at is not None
    assert sum(slept) == pytest.approx(3 * (2 + 5.5) / 10, abs=0.2), "slowly"
    shelf.damage(second)
    shelf.store.delete(third)
    assert sorted(scrubber.scrub()) == sorted([second, third])
    assert sorted(ear.failures) == ["digest", "missing"] and ear.outcomes == ["moved"]
    assert shelf.control.registry.resolve(shelf.control.acme.id, "best").digest == first


def test_over_http_the_alias_answers_from_its_former_version_and_the_damaged_model_says_what_it_is(
    served: Served, tmp_path: Path
) -> None:
    shelf = Shelf(served.control, tmp_path / "shelf")
    (good, _), (bad, digest) = (shelf.version(name, alias="best") for name in ("good", "bad"))
    fallback = Fallback(served.control.database, served.control.registry, shelf.store, served.metrics)
    served.api.state.services = replace(served.api.state.services, fallback=fallback, store=shelf.store)
    shelf.damage(digest)
    served.engine.unavailable[digest] = "adapter_damaged"

    def ask(model: str) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
        return served.http().post("/v1/chat/completions", json=body)

    first, again, direct = ask("best"), ask("best"), ask(bad)
    assert (first.status_code, first.headers["retry-after"]) == (503, "1")
    assert first.json()["error"]["code"] == "adapter_damaged"
    assert (again.status_code, again.json()["model"]) == (200, good)
    assert again.headers["x-rootstock-fallback-from"] == bad
    assert (direct.status_code, direct.headers["x-should-retry"]) == (503, "false")
    assert direct.json()["error"]["code"] == "adapter_damaged" and direct.json()["error"]["param"] == "model"
    assert served.http().get("/v1/aliases/best").json()["history"][0]["kind"] == "fallback"
    exported = served.http().get(f"/v1/adapters/{bad}/export")
    assert (exported.status_code, exported.json()["error"]["code"]) == (503, "adapter_damaged")
    assert 'rootstock_alias_fallbacks_total{outcome="moved"} 1.0' in served.scrape()
