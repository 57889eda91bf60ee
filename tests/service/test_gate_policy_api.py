"""A tenant's gate policy over a socket, and what a job makes of it."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.gate import GatePolicy
from tests.service.http_fixtures import Served

POLICY = "/v1/gate_policy"
JOBS = "/v1/fine_tuning/jobs"


def _gate_of_a_job(served: Served, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "training_file": served.control.upload(), **fields}
    answer = served.http().post(JOBS, json=body)
    assert answer.status_code == 200, answer.text
    gate: dict[str, Any] = answer.json()["gate"]
    return gate


@pytest.mark.slow
def test_without_a_policy_of_its_own_a_tenant_has_the_default(served: Served) -> None:
    assert served.http().get(POLICY).json() == {"object": "gate_policy", **GatePolicy().as_dict()}


def test_a_policy_is_set_whole_and_is_nobody_elses(served: Served) -> None:
    http = served.http()
    first = http.put(POLICY, json={"max_forgetting": 2.0, "few_examples": "hold"}).json()
    assert (first["max_forgetting"], first["few_examples"], first["max_p"]) == (2.0, "hold", 0.05)
    second = http.put(POLICY, json={"min_gain_over_few_shot": None}).json()
    assert (second["max_forgetting"], second["min_gain_over_few_shot"]) == (None, None)
    assert http.get(POLICY).json() == second
    assert served.http(served.control.zenith_key).get(POLICY).json()["min_gain_over_few_shot"] == 0.0


@pytest.mark.parametrize(
    ("body", "param"),
    [({"max_p": 2}, "max_p"), ({"speed": 1}, "speed"), ({"min_examples": "9"}, "min_examples")],
)
def test_a_wrong_policy_is_a_400_that_names_the_field(served: Served, body: dict[str, Any], param: str) -> None:
    answer = served.http().put(POLICY, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_job_keeps_the_policy_that_it_was_made_under(served: Served) -> None:
    http = served.http()
    http.put(POLICY, json={"max_forgetting": 2.0})
    job = http.post(JOBS, json={"model": "tiny", "training_file": served.control.upload()}).json()
    http.put(POLICY, json={})
    assert http.get(f"{JOBS}/{job['id']}").json()["gate"]["max_forgetting"] == 2.0


def test_a_job_may_differ_from_the_policy_or_switch_the_gate_off(served: Served) -> None:
    served.http().put(POLICY, json={"max_forgetting": 2.0, "max_p": 0.01})
    gate = _gate_of_a_job(served, gate={"max_forgetting": None, "min_examples": 5})
    assert (gate["max_forgetting"], gate["max_p"], gate["min_examples"], gate["enabled"]) == (None, 0.01, 5, True)
    assert _gate_of_a_job(served, gate="off")["enabled"] is False
    assert _gate_of_a_job(served)["max_forgetting"] == 2.0


def test_a_tenant_that_is_deleted_takes_its_policy_along(served: Served) -> None:
    served.http().put(POLICY, json={"max_p": 0.01})
    tenant = served.control.acme.id
    served.control.tenants.delete(tenant)
    assert served.control.jobs.gate_policies.get(tenant) == GatePolicy()
