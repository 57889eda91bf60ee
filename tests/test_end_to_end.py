"""The main job over the real service: train, serve, swap; and after `kill -9` nothing acknowledged is lost."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob
from prometheus_client.parser import text_string_to_metric_families

from adapters.drift.reference import read_reference
from tests.running_service import Running, rootstock_serve

pytestmark = pytest.mark.slow

COLOURS = {"apple": "red", "lemon": "yellow", "plum": "blue", "leaf": "green", "coal": "black", "snow": "white"}
HYPERPARAMETERS = {"n_epochs": 20, "batch_size": 12, "learning_rate": 5e-3, "lora_r": 8, "eval_every": 10}
METHOD: Any = {"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}}


def rows(num: int = 48) -> bytes:
    things = list(COLOURS.items())
    lines = []
    for index in range(num):
        thing, colour = things[index % len(things)]
        question = {"role": "user", "content": f"Which colour has {thing}?"}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": colour}]}))
    return "\n".join(lines).encode()


def ask(client: openai.OpenAI, model: str, thing: str = "lemon") -> openai.types.chat.ChatCompletion:
    messages = [{"role": "user", "content": f"Which colour has {thing}?"}]
    return client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=8)  # type: ignore[arg-type]


def await_job(
    client: openai.OpenAI, job_id: str, reached: Callable[[FineTuningJob], bool], meanwhile: Callable[[], object]
) -> FineTuningJob:
    deadline = time.monotonic() + 120
    while not reached(job := client.fine_tuning.jobs.retrieve(job_id)):
        assert job.status not in ("failed", "cancelled") and time.monotonic() < deadline, job
        meanwhile()
    return job


def messages(client: openai.OpenAI, job_id: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]


def metric(running: Running, name: str) -> float:
    text = httpx.get(f"{running.ops_url}/metrics").text
    found = [s.value for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
    return float(sum(found))


def test_an_adapter_is_trained_while_chat_flows_and_the_next_request_uses_it(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with rootstock_serve(tiny_llama_dir, tmp_path) as running, running.client() as client:
        (base,) = (model.id for model in client.models.list())
        file = client.files.create(file=("colours.jsonl", rows()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=base,
            training_file=file.id,
            suffix="colours",
            seed=1,
            method=METHOD,
            extra_body={"alias": "painter"},
        )
        served = []
        job = await_job(client, job.id, lambda j: j.status == "succeeded", lambda: served.append(ask(client, base)))
        assert len(served) > 3 and all(answer.model == base for answer in served)
        for thing, colour in COLOURS.items():
            for model in (job.fine_tuned_model, "painter"):
                assert model is not None
                answer = ask(client, model, thing)
                assert (answer.choices[0].message.content, answer.model) == (colour, job.fine_tuned_model)
        raw = client.chat.completions.with_raw_response.create(
            model="painter", messages=[{"role": "user", "content": "Which colour has coal?"}]
        )
        assert len(raw.headers["x-rootstock-adapter"]) == 64
        checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
        assert ask(client, checkpoints[0].fine_tuned_model_checkpoint).choices[0].message.content
        table = client.files.content(job.result_files[0]).text
        assert table.startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,")
        with running.client("stranger") as stranger, pytest.raises(openai.NotFoundError):
            ask(stranger, str(job.fine_tuned_model))
        assert metric(running, "rootstock_adapters_resident") >= 1
        assert metric(running, "rootstock_time_to_first_token_seconds_count") > len(COLOURS)


@pytest.mark.parametrize("engine_process", [True, False])
def test_a_job_leaves_a_drift_reference_and_an_export_without_it(
    engine_process: bool, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOTSTOCK_ENGINE_PROCESS", str(engine_process))
    lines = [
        {"messages": [{"role": "user", "content": f"Tree {i}?"}, {"role": "assistant", "content": "A medlar."}]}
        for i in range(100)
    ]
    hyperparameters = {"n_epochs": 1, "batch_size": 16, "learning_rate": 5e-3, "lora_r": 4}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    with rootstock_serve(tiny_llama_dir, tmp_path, drift_run_length=500) as running, running.client() as client:
        (base,) = (model.id for model in client.models.list())
        content = "\n".join(map(json.dumps, lines)).encode()
        file = client.files.create(file=("trees.jsonl", content), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=base, training_file=file.id, method=method)
        job = await_job(client, job.id, lambda j: j.status == "succeeded", lambda: time.sleep(0.1))
        assert any(m.startswith("Drift reference made of 90 training prompts in ") for m in messages(client, job.id))
        adapter = f"{running.url}/v1/adapters/{job.fine_tuned_model}"
        headers = {"authorization": f"Bearer {client.api_key}"}
        card = httpx.get(f"{adapter}/card", headers=headers).raise_for_status().json()
        assert card["measurement"]["drift_reference"]["num_prompts"] == 90
        assert {"drift.json", "drift.safetensors"} < card["verification"]["files"].keys()
        (directory,) = (path.parent for path in tmp_path.rglob("drift.json"))
        assert directory.name == card["digest"]
        assert read_reference(directory) is not None
        exported = httpx.get(f"{adapter}/export", headers=headers).raise_for_status().content
        names = zipfile.ZipFile(io.BytesIO(exported)).namelist()
        assert sorted(names) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert ask(client, str(job.fine_tuned_model)).model == job.fine_tuned_model


def test_after_kill_9_nothing_acknowledged_is_lost_and_the_job_goes_on_from_its_last_state(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"lease_seconds": 2, "resume_point_seconds": 0}
    with rootstock_serve(tiny_llama_dir, tmp_path, **settings) as running, running.client() as client:
        (base,) = (model.id for model in client.models.list())
        key = client.api_key
        file = client.files.create(file=("colours.jsonl", rows()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=base,
            training_file=file.id,
            seed=1,
            method=METHOD,
        )
        await_job(client, job.id, lambda j: any(m.startswith("Step 20/") for m in messages(client, j.id)), lambda: None)
        running.process.kill()
        running.process.wait()
    with rootstock_serve(tiny_llama_dir, tmp_path, **settings) as again, again.client_with(key) as client:
        assert client.files.content(file.id).read() == rows()
        job = await_job(client, job.id, lambda j: j.status == "succeeded", lambda: time.sleep(0.1))
        said = messages(client, job.id)
        (resumed,) = [int(m.rpartition(" ")[2]) for m in said if m.startswith("Resuming from step")]
        assert resumed >= 19
        steps = [int(m.split()[1].split("/")[0]) for m in said if m.startswith("Step ")]
        assert sorted(set(steps)) == list(range(1, max(steps) + 1))
        assert ask(client, str(job.fine_tuned_model)).choices[0].message.content == "yellow"
