"""After a change of the base its adapters are stale: told everywhere, never served, and back when the base is back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.errors import StaleAdapterError
from service.registry import Registry
from tests.service.control_fixtures import BASE, Control
from tests.service.http_fixtures import Served


def test_a_stale_model_is_refused_counted_and_comes_back_with_its_base(control: Control) -> None:
    model, tenant = control.publish(alias="best"), control.acme.id
    changed = Registry(control.database, replace(BASE, fingerprint=f"{BASE.fingerprint}+int8"))
    assert (control.registry.num_stale(), changed.num_stale()) == (0, 1)
    for name in (model, "best"):
        with pytest.raises(StaleAdapterError, match=r"stale: .*Fine-tune or import it again") as caught:
            changed.resolve(tenant, name)
        assert caught.value.code == "stale_adapter"
    assert control.registry.resolve(tenant, "best").id == model


def test_lists_aliases_and_cards_say_that_a_model_is_stale(served: Served) -> None:
    model = served.control.publish(alias="best")
    client = served.http()
    paths = (f"/v1/models/{model}", "/v1/aliases/best", f"/v1/adapters/{model}")
    assert [client.get(path).json()["stale"] for path in paths] == [False] * 3
    changed = Registry(served.control.database, replace(BASE, fingerprint="another"))
    served.api.state.services = replace(served.api.state.services, registry=changed)
    assert [client.get(path).json()["stale"] for path in paths] == [True] * 3
    answer = client.post("/v1/chat/completions", json={"model": "best", "messages": [{"role": "user", "content": "x"}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "stale_adapter")
    assert served.engine.requests == [], "nothing is loaded onto the wrong base"
