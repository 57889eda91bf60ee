"""A busy run of the real service in its two processes: what its log and its traces tell, and what they never tell."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.running_service import ADMIN_KEY, rootstock_serve
from tests.service.otlp_receiver import Receiver, otlp_receiver

pytestmark = pytest.mark.slow

SECRET_WORDS = ("zanzibar", "mirabelle", "bullace", "greengage")
"""Of a prompt, a prompt that fails, a text to embed, and the training data."""
TRACE = "0af7651916cd43dd8448eb211c80319c"
QUICK: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "lora_r": 4}}}


@dataclass(frozen=True)
class BusyRun:
    text: str
    receiver: Receiver
    key: str
    answer: str
    request_id: str
    tenant: str
    job_id: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def busy(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BusyRun]:
    directory = tmp_path_factory.mktemp("busy")
    with otlp_receiver() as receiver:
        options: dict[str, Any] = {"otlp_endpoint": receiver.url, "log_level": "debug"}
        with rootstock_serve(tiny_llama_dir, directory, **options) as running, running.client() as client:
            (model,) = (each.id for each in client.models.list())
            asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": SECRET_WORDS[0]}]}
            raw = client.chat.completions.with_raw_response.create(
                **asked,
                max_tokens=60,
                extra_headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"},
                extra_body={"ignore_eos": True},  # a random base may end at once, and little could be looked for
            )
            answer = raw.parse().choices[0].message.content or ""
            list(client.chat.completions.create(**asked, max_tokens=20, n=3, stream=True))
            broken: Any = [{"role": SECRET_WORDS[1], "content": SECRET_WORDS[1]}]
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model=model, messages=broken)
            with pytest.raises(openai.AuthenticationError):
                running.client_with("rs-" + SECRET_WORDS[1]).models.list()
            client.embeddings.create(model=model, input=SECRET_WORDS[2], encoding_format="float")
            question = [{"role": "user", "content": SECRET_WORDS[3]}, {"role": "assistant", "content": "a fruit"}]
            content = b"\n".join(json.dumps({"messages": question}).encode() for _ in range(16))
            file = client.files.create(file=("fruit.jsonl", content), purpose="fine-tune")
            job = client.fine_tuning.jobs.create(model=model, training_file=file.id, seed=1, method=QUICK)
            running.wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(60) == 0
            request_id, key = raw.headers["x-request-id"], client.api_key
        text = (directory / "log").read_text()
        tenant = next(line["tenant"] for line in map(json.loads, _json(text)) if line.get("request_id") == request_id)
        yield BusyRun(text, receiver, key, answer, request_id, tenant, job.id)


def _json(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("{")]


def test_the_log_has_no_key_no_prompt_and_no_answer(busy: BusyRun) -> None:
    assert busy.key not in busy.text and ADMIN_KEY not in busy.text and "Bearer" not in busy.text
    assert not [word for word in SECRET_WORDS if word in busy.text]
    assert len(busy.answer) > 20 and busy.answer not in busy.text and json.dumps(busy.answer)[1:-1] not in busy.text


def test_every_line_of_the_log_is_json_but_the_one_for_the_terminal(busy: BusyRun) -> None:
    others = [line for line in busy.text.splitlines() if not line.startswith("{")]
    assert len(others) == 1 and others[0].startswith("Rootstock serves ")


def test_every_line_of_a_request_carries_its_ids(busy: BusyRun) -> None:
    about = [line for line in busy.lines if line.get("request_id") == busy.request_id]
    assert [line["event"] for line in about] == ["request"]
    requests = [line for line in busy.lines if line["event"] == "request"]
    assert len(requests) > 8 and all({"request_id", "trace_id"} <= line.keys() for line in requests)
    known = [line for line in requests if line["status"] == 200 and not line["path"].startswith("/v1/admin")]
    assert {line["tenant"] for line in known} == {busy.tenant}
    assert about[0]["trace_id"] == TRACE


def test_the_log_of_the_engines_process_tells_the_job_its_tenant_and_its_trace(busy: BusyRun) -> None:
    lines = [line for line in busy.lines if line["event"].startswith("tuning.")]
    assert {line["event"] for line in lines} >= {"tuning.claimed", "tuning.succeeded", "tuning.run_finished"}
    (run,) = busy.receiver.named("fine_tuning_job")
    assert {(line["job_id"], line["tenant"], line["trace_id"]) for line in lines} == {
        (busy.job_id, busy.tenant, run.trace_id)
    }


def test_a_collector_gets_the_requests_of_one_process_and_the_jobs_of_the_other(busy: BusyRun) -> None:
    assert busy.receiver.paths == {"/v1/traces"}
    of_chat = [span for span in busy.receiver.spans if span.trace_id == TRACE]
    (server,) = [span for span in of_chat if span.name == "POST /v1/chat/completions"]
    assert server.parent_id == "b7ad6b7169203331" and server.process == "api"
    assert {span.name for span in of_chat if span.parent_id == server.span_id} == {"queue", "prefill", "decode"}
    assert busy.request_id in server.attributes["rootstock.request_id"]
    (run,) = busy.receiver.named("fine_tuning_job")
    children = [span.name for span in busy.receiver.spans if span.parent_id == run.span_id]
    assert run.process == "engine"
    assert set(children) == {"load_data", "training_slice", "drift_reference", "evaluation", "publish"}


def test_no_word_of_a_prompt_and_no_key_travels_to_the_collector(busy: BusyRun) -> None:
    sent = b"".join(busy.receiver.bodies)
    assert not [word for word in (*SECRET_WORDS, busy.key, ADMIN_KEY) if word.encode() in sent]
