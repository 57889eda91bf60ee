"""Drift through the whole service: a real base and engine, a real reference, prompts over HTTP, real monitors."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from adapters.drift.build import build_reference
from adapters.drift.output_monitor import BASELINE_SIZE, OutputMonitor
from adapters.drift.reference import write_reference
from adapters.lora_weights import LoraWeights
from adapters.peft_format import write_adapter
from service.background_generation import probe_prompts
from service.drift_calibration import Calibrated, CalibrationProcess
from service.drift_prompt import drift_basis, probe_tokens
from service.engine.base_model import load_base_model
from tests.adapters.loras import random_lora
from tests.running_service import rootstock_serve
from tests.service.drift_fixtures import wait_until
from tests.service.real_service import RealService, serve_real

THINGS = (
    *("apple", "lemon", "plum", "leaf", "coal", "snow", "river", "stone"),
    *("cloud", "candle", "ladder", "basket", "window", "feather", "copper", "marble"),
)
PLACES = ("garden", "kitchen", "harbour", "market", "cellar", "attic", "forest", "meadow", "station", "library")
RUN_LENGTH = 1000.0


def usual(rng: random.Random) -> str:
    """The traffic that the adapter is made for."""
    things = ", ".join(rng.sample(THINGS, rng.randint(2, 5)))
    return f"Which colours have these in the {rng.choice(PLACES)}: {things}? Number {rng.randint(0, 9999)}."


def other(rng: random.Random) -> str:
    """Quite another."""
    rows = "; ".join(f"ERR-{rng.randint(100, 999)}={rng.random():.5f}" for _ in range(rng.randint(2, 5)))
    return f"{{{rows}}}"


@pytest.fixture(scope="module")
def service(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealService]:
    base = load_base_model(str(tiny_llama_dir), quantization="none", name="tiny")
    adapters: dict[str, LoraWeights] = {}
    with serve_real(base, tmp_path_factory.mktemp("drift"), adapters, drift=True) as running:
        digest = published(running, tmp_path_factory.mktemp("adapter") / "adapter", adapters)
        for tenant in (running.control.acme, running.control.zenith):
            running.control.publish(tenant, digest=digest, suffix="colours")
        yield running


def published(running: RealService, directory: Path, adapters: dict[str, LoraWeights]) -> str:
    """An adapter in the store with a reference of 200 usual prompts, as a job leaves it; its digest."""
    base, rng = running.base, random.Random(1)
    prompts = [tuple(base.render_chat([{"role": "user", "content": usual(rng)}])) for _ in range(200)]
    chunks = probe_prompts(running.engine, "acme/drift", [probe_tokens(prompt) for prompt in prompts], lambda: None)
    embeddings = np.stack([chunk.embedding for chunk in chunks if chunk.embedding is not None])
    scalars = {
        "prompt_length": np.array([float(len(prompt)) for prompt in prompts]),
        "prompt_nll": np.array([chunk.prompt_nll for chunk in chunks], dtype=np.float64),
    }
    reference = build_reference(
        embeddings, scalars, basis=drift_basis(base), run_length=RUN_LENGTH, seed=1, check=lambda: None
    )
    weights = random_lora(base.signature, seed=5)
    write_adapter(directory, weights, base_name="tiny", base=base.signature)
    write_reference(directory, reference)
    digest = running.store.publish(directory)
    adapters[digest] = weights
    return digest


def ask(client: httpx.Client, model: str, content: str) -> None:
    body = {"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": content}]}
    client.post("/v1/chat/completions", json=body).raise_for_status()


def signals(client: httpx.Client, model: str) -> dict[str, dict[str, Any]]:
    return {one["signal"]: one for one in client.get(f"/v1/drift/{model}").json()["signals"]}


def settle(service: RealService) -> None:
    drift = service.drift
    assert drift is not None
    wait_until(lambda: drift.is_quiet, 60)


def result_of(process: CalibrationProcess) -> Calibrated:
    deadline = time.monotonic() + 60
    while (done := process.take()) is None:
        assert time.monotonic() < deadline, "it never ended"
        time.sleep(0.01)
    return done


def model_of(service: RealService, tenant_id: str) -> str:
    return next(v.id for v in service.control.registry.versions(tenant_id) if ":colours:" in v.id)


@pytest.mark.slow
def test_a_tenant_whose_traffic_shifts_drifts_and_one_whose_does_not_stays_ok(service: RealService) -> None:
    control, rng = service.control, random.Random(7)
    acme, zenith = service.http(control.acme_key), service.http(control.zenith_key)
    mine, theirs = model_of(service, control.acme.id), model_of(service, control.zenith.id)
    for number in range(100):
        for client, model, shifts in ((acme, mine, True), (zenith, theirs, False)):
            ask(client, model, other(rng) if shifts and number >= 40 else usual(rng))
            settle(service)
        if number == 39:
            before = signals(acme, mine)
    assert {before[name]["state"] for name in ("prompt_embedding", "prompt_length", "prompt_nll")} == {"ok"}
    shifted, same = signals(acme, mine), signals(zenith, theirs)
    assert shifted["prompt_embedding"]["state"] == "drift" and 40 < shifted["prompt_embedding"]["samples"] <= 100
    assert shifted["prompt_embedding"]["ratio"] > 1 and shifted["prompt_nll"]["state"] == "drift"
    assert {same[name]["state"] for name in ("prompt_embedding", "prompt_length", "prompt_nll")} == {"ok"}
    assert {one["state"] for name, one in same.items() if name.startswith("answer")} == {"insufficient_data"}
    events = acme.get("/v1/drift_events", params={"model": mine}).json()["data"]
    assert ("prompt_embedding", "drift", "ok") in [(one["signal"], one["state"], one["previous"]) for one in events]
    scrape = httpx.get(f"{service.ops_url}/metrics").text
    assert f'rootstock_drift_state{{signal="prompt_embedding",state="drift",tenant="{control.acme.id}"}} 1.0' in scrape
    assert f'rootstock_drift_state{{signal="prompt_embedding",state="ok",tenant="{control.zenith.id}"}} 1.0' in scrape


@pytest.mark.slow
def test_a_baseline_of_answers_is_calibrated_in_a_child_to_what_it_would_be_here() -> None:
    rng = np.random.default_rng(2)
    monitor = OutputMonitor(500.0, 3)
    for _ in range(BASELINE_SIZE):
        monitor.observe({"refusal": float(rng.random() < 0.05)})
    process = CalibrationProcess(500.0)
    process.start(("acme", "d"), 3, monitor.state_dict())
    done = result_of(process)
    monitor.calibrate(lambda: None)
    assert done == Calibrated(("acme", "d"), monitor.state_dict()) and not process.is_busy


def test_a_calibration_that_fails_or_is_stopped_has_no_state() -> None:
    process = CalibrationProcess(500.0)
    process.start(("acme", "d"), 3, b"no state at all")
    assert result_of(process) == Calibrated(("acme", "d"), None)
    monitor = OutputMonitor(10_000_000.0, 3)
    for number in range(BASELINE_SIZE):
        monitor.observe({"answer_nll": float(number), "answer_length": float(number)})
    process.start(("acme", "d"), 3, monitor.state_dict())
    process.stop()
    assert process.take() == Calibrated(("acme", "d"), None)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_an_adapter_that_was_trained_here_is_watched_and_drifts_when_its_traffic_does(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """The very commands: engine and training in their own process, the reference made by the job."""
    rng = random.Random(3)
    rows = [
        {"messages": [{"role": "user", "content": usual(rng)}, {"role": "assistant", "content": rng.choice(THINGS)}]}
        for _ in range(120)
    ]
    with rootstock_serve(tiny_llama_dir, tmp_path) as running, running.client() as client:
        (base,) = (model.id for model in client.models.list())
        file = client.files.create(file=("train.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=base, training_file=file.id, seed=1, suffix="colours", hyperparameters={"n_epochs": 1}
        )
        wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"), 400)
        model = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
        assert model is not None

        def asked(content: str) -> None:
            messages: Any = [{"role": "user", "content": content}]
            client.chat.completions.create(model=model, messages=messages, max_tokens=2)

        def shown() -> dict[str, Any]:
            body = httpx.get(f"{client.base_url}drift/{model}", headers=client.auth_headers).raise_for_status().json()
            return {one["signal"]: one for one in body["signals"]} | {"reference": body["reference"]}

        for _ in range(48):
            asked(usual(rng))
        wait_until(lambda: shown()["prompt_embedding"]["samples"] >= 40, 60)
        assert (shown()["reference"], shown()["prompt_embedding"]["state"]) == ("ok", "ok")
        for _ in range(48):
            asked(other(rng))
        wait_until(lambda: shown()["prompt_embedding"]["state"] == "drift", 60)
