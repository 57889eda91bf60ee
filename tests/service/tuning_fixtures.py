"""A whole workshop for fine-tuning jobs: SQLite, store, a tiny fp32 base, the real engine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from adapters.lora_weights import LoraWeights
from adapters.peft_format import read_adapter
from adapters.store import AdapterStore
from service.database import connect
from service.engine.base_model import BaseModel, load_base_model
from service.engine.engine import Engine
from service.engine.engine_config import EngineConfig
from service.engine.sequence import GenerationRequest, OutputChunk, SamplingParams, SequenceReport
from service.files import FilePurpose
from service.job import Hyperparameters, Job, JobStatus
from service.registry import BaseIdentity, Registry
from service.resume_points import ResumePoints
from service.tuning import TuningServices
from tests.service.control_fixtures import Control, make_control

__all__ = ["tiny_base", "workshop"]

EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
QUICK = Hyperparameters(n_epochs=3, batch_size=4, learning_rate=5e-3, lora_r=8, target_modules=EVERYTHING)


@dataclass
class Tally:
    """Observes engine and worker."""

    outcomes: list[str] = field(default_factory=list)
    num_tokens: int = 0

    def sequence_finished(self, report: SequenceReport) -> None: ...

    def adapter_loaded(self, tier: str, seconds: float) -> None: ...

    def adapter_evicted(self, reason: str) -> None: ...

    def adapter_verify_failed(self, reason: str) -> None: ...

    def job_run_finished(self, outcome: str, seconds: float) -> None:
        self.outcomes.append(outcome)

    def tokens_trained(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens


@dataclass(frozen=True)
class Workshop:
    control: Control
    base: BaseModel
    store: AdapterStore
    engine: Engine
    services: TuningServices
    tally: Tally

    def upload(self, rows: list[object]) -> str:
        lines = [json.dumps(row).encode() + b"\n" for row in rows]
        return self.control.files.create(self.control.acme.id, "train.jsonl", FilePurpose.FINE_TUNE, lines).id

    def submit(self, rows: list[object] | None = None, **spec: object) -> Job:
        values: dict[str, object] = {"hyperparameters": QUICK, "seed": 3, **spec}
        values.setdefault("training_file", self.upload(medlars(24) if rows is None else rows))
        return self.control.create_job(self.control.acme, **values)

    def job(self, job: Job) -> Job:
        return self.control.jobs.get(self.control.acme.id, job.id)

    def messages(self, job: Job) -> list[str]:
        """What the job's events say, oldest first."""
        page = self.control.jobs.events(self.control.acme.id, job.id, limit=1000)
        return [event.message for event in reversed(page.items)]

    def digest(self, job: Job) -> str:
        """The adapter that the finished job's model names."""
        model = self.job(job).fine_tuned_model
        assert model is not None
        digest = self.control.registry.resolve(self.control.acme.id, model).digest
        assert digest is not None
        return digest

    def weights(self, digest: str) -> LoraWeights:
        return read_adapter(self.store.read(digest), self.base.signature, max_rank=64)

    def await_state(self, job: Job, state: JobStatus, seconds: float = 60) -> Job:
        self.await_that(lambda: self.job(job).state is state, seconds)
        return self.job(job)

    def await_that(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "this took too long"
            time.sleep(0.01)

    def answer(self, question: str, adapter: str | None) -> str:
        """Greedy, through the engine."""
        prompt = self.base.render_chat([{"role": "user", "content": question}])
        done = threading.Event()
        chunks: list[OutputChunk] = []

        def take(chunk: OutputChunk) -> None:
            chunks.append(chunk)
            if chunk.finish_reason is not None:
                done.set()

        sampling = SamplingParams(max_tokens=12, temperature=0.0)
        self.engine.submit(GenerationRequest(f"ask-{id(done)}", tuple(prompt), sampling, "acme", adapter), take)
        assert done.wait(30)
        assert chunks[-1].error is None
        return "".join(chunk.text for chunk in chunks)


def medlars(count: int) -> list[object]:
    """Every question has one answer, which even a random model can learn by heart."""
    return [
        {"messages": [{"role": "user", "content": f"word {i}?"}, {"role": "assistant", "content": "a medlar"}]}
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def tiny_base(tiny_llama_dir: Path) -> BaseModel:
    return load_base_model(str(tiny_llama_dir), quantization="none", device="cpu", name="tiny")


@pytest.fixture
def workshop(tiny_base: BaseModel, tmp_path: Path) -> Iterator[Workshop]:
    url = f"sqlite:///{tmp_path / 'rootstock.db'}"
    database = connect(url)
    control = make_control(database, url, tmp_path / "storage")
    registry = Registry(database, BaseIdentity("tiny", tiny_base.identity))
    control = replace(control, registry=registry)
    store, tally = AdapterStore(str(tmp_path / "storage"), tmp_path / "cache"), Tally()
    engine = Engine(
        tiny_base,
        lambda digest: read_adapter(store.read(digest), tiny_base.signature, max_rank=64),
        EngineConfig(kv_cache_bytes=8 * 1024 * 1024, max_num_seqs=4, max_lora_slots=4),
        tally,
    )
    engine.start()
    services = TuningServices(
        queue=control.queue,
        files=control.files,
        store=store,
        resume_points=ResumePoints(str(tmp_path / "storage")),
        base=tiny_base,
        engine=engine,
        observer=tally,
        max_lora_rank=64,
    )
    yield Workshop(control, tiny_base, store, engine, services, tally)
    engine.shutdown(0.0)
    database.close()


def eager(services: TuningServices) -> TuningServices:
    """Saves a resume point after every step."""
    return replace(services, save_every_seconds=0.0)
