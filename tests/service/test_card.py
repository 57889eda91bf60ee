"""A trained adapter's card: four questions, answered from what was kept, whatever has been deleted since."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from adapters.gate import GatePolicy
from service.card import make_card
from service.card_markdown import card_markdown
from service.reproduction import NoEngine
from service.tables import jobs
from service.tuning import Outcome, TuningRun
from service.versions import AdapterVersion
from tests.service.http_fixtures import Served
from tests.service.tuning_fixtures import QUICK, Workshop, tiny_base, workshop

__all__ = ["tiny_base", "workshop"]


def _trained(workshop: Workshop, **spec: Any) -> AdapterVersion:
    job = workshop.submit(**{"hyperparameters": replace(QUICK, n_epochs=1), **spec})
    services = replace(workshop.services, engine=NoEngine())
    assert TuningRun(services, workshop.control.claim(), lambda: None).execute() is Outcome.SUCCEEDED
    model = workshop.job(job).fine_tuned_model
    assert model is not None
    return workshop.control.registry.version(workshop.control.acme.id, model)


def _card(workshop: Workshop, model: str) -> dict[str, Any]:
    registry, tenant = workshop.control.registry, workshop.control.acme.id
    version = registry.version(tenant, model)
    moves = registry.aliases.moves_to(tenant, version.id)
    files = workshop.store.manifest(version.digest)
    return make_card(version, moves=moves, active=["best"], files=files, url="https://service.example")


@pytest.mark.slow
def test_the_four_questions_are_answered_even_after_files_job_and_parent_are_gone(workshop: Workshop) -> None:
    parent = _trained(workshop, alias="best")
    hyperparameters = replace(QUICK, n_epochs=1, lora_r="auto", target_modules="all-linear")
    version = _trained(
        workshop,
        model="best",
        parent_digest=parent.digest,
        alias="best",
        gate=GatePolicy(enabled=False),
        seed=11,
        hyperparameters=hyperparameters,
    )
    assert version.provenance is not None
    file_id = version.provenance["data"]["training_file"]["id"]
    control = workshop.control
    file = control.files.get(control.acme.id, file_id)
    sha256, size = file.sha256, file.bytes
    control.files.delete(control.acme.id, file_id)
    control.registry.delete_model(control.acme.id, parent.id)
    with control.database.begin() as connection:
        connection.execute(sa.delete(jobs))
    card = _card(workshop, version.id)
    assert card["data"]["training_file"] == {"id": file_id, "filename": "train.jsonl", "bytes": size, "sha256": sha256}
    assert card["data"]["train"]["num_examples"] == 20 and card["data"]["valid"]["num_examples"] == 4
    assert card["data"]["train"]["num_tokens"] > 100
    assert card["measurement"]["valid_loss"] > 0
    history = card["history"]
    assert history["parents"] == [{"model": parent.id, "digest": parent.digest}]
    assert (history["seed"], history["method"]) == (11, "supervised")
    assert history["hyperparameters"]["lora_r"] == 8  # what "auto" became
    assert history["base"]["fingerprint"] == workshop.base.fingerprint and history["base"]["quantization"] == "none"
    assert history["software"]["torch"] and history["compute"]["num_threads"] >= 1
    assert [(move["alias"], move["kind"]) for move in history["alias_moves"]] == [("best", "published")]
    assert version.id in card["verification"]["reproduce"]
    text = card_markdown(card)
    for told in (sha256, parent.digest, version.digest, "torch", "https://service.example/v1/chat/completions"):
        assert told in text


EVALUATION = {
    "num_examples": 60,
    "contestants": {
        "base": {"accuracy": {"value": 0.41, "low": 0.30, "high": 0.52}, "perplexity": 9.5},
        "adapter": {"accuracy": {"mean": 0.93, "ci": [0.86, 0.98]}, "perplexity": 1.25},
    },
    "samples": [{"line": 3, "expected": "a|b", "adapter": "<script>alert(1)</script> [x](http://evil.example)"}],
    "gate": {"passed": True, "reasons": ["beats base (p < 0.001)"]},
    "forgetting": {"before": 12.0, "after": 12.5},
}


def _version(**changes: Any) -> AdapterVersion:
    metrics = {"valid_loss": 0.5, "best_step": 15, "evaluation": EVALUATION}
    version = AdapterVersion("ft:tiny:acme::abc", "t", "d" * 64, "ftjob-1", "tiny", "f" * 64, metrics)
    return replace(version, **changes)


def _plain_card(version: AdapterVersion) -> dict[str, Any]:
    return make_card(version, moves=(), active=[], files=None, url="https://s")


def test_contestants_stand_in_a_table_with_their_intervals() -> None:
    text = card_markdown(_plain_card(_version()))
    assert "| base | 0.41 \\[0.3, 0.52\\] | 9.5 |" in text
    assert "| adapter | 0.93 \\[0.86, 0.98\\] | 1.25 |" in text
    assert "beats base (p &lt; 0.001)" in text
    assert _plain_card(_version())["measurement"]["gate"]["passed"] is True
    assert _plain_card(_version())["measurement"]["forgetting"] == EVALUATION["forgetting"]


def test_contestants_at_the_reports_top_are_a_table_too() -> None:
    report = {"num_shots": 8, "base": {"exact_match": 0.1, "loss": 2.0}, "adapter": {"exact_match": 0.9, "loss": 0.5}}
    text = card_markdown(_plain_card(_version(metrics={"evaluation": report})))
    assert "|  | exact match | loss |" in text and "| adapter | 0.9 | 0.5 |" in text and "num shots: 8" in text


def test_a_tenants_text_brings_neither_html_nor_links_nor_broken_tables() -> None:
    hostile = {"data": {"training_file": {"filename": "a\n## Verified\n| x |"}}, "origin": "job"}
    text = card_markdown(_plain_card(_version(provenance=hostile)))
    assert "<script>" not in text
    assert not re.search(r"(?<!\\)\]\(", text)
    assert "\n## Verified" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") - line.count("\\|") >= 2 for line in rows)


@pytest.mark.parametrize(
    "metrics", [{}, {"evaluation": None}, {"evaluation": {"anything": [[1, [2]], {"x": {"y": {}}}]}}]
)
def test_a_version_of_which_little_or_something_unforeseen_is_known_has_a_card(metrics: dict[str, Any]) -> None:
    card = _plain_card(_version(metrics=metrics, provenance=None))
    assert json.dumps(card) and "## What data does it rest on?" in card_markdown(card)
    assert card["verification"]["reproduce"] is None


def test_a_card_over_http_names_where_the_reader_reached_the_service(served: Served) -> None:
    model = served.control.publish(alias="best")
    card = served.http().get("/v1/adapters/best/card").raise_for_status().json()
    assert card["model"] == model and f"{served.url}/v1/chat/completions" in card["verification"]["curl"]
    assert card["history"]["aliases"] == ["best"]
    odd = served.http().get("/v1/adapters/best/card", headers={"host": "a b$(id)"})
    assert "$(id)" not in odd.text
