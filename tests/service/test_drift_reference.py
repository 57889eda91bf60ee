"""The drift reference that a job leaves in its adapter: of which prompts, with which numbers, and what it changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import LlamaForCausalLM

from adapters.drift.reference import DriftReference, read_reference
from adapters.example import ChatExample, CompletionExample, Example, Message
from service.background_generation import probe_prompts
from service.card import make_card
from service.drift_prompt import MAX_PROMPT_TOKENS, drift_basis
from service.drift_reference import MAX_PROMPTS, TuningReference
from service.engine.base_model import BaseModel, load_base_model
from service.engine.sequence import FinishReason, GenerationRequest, OutputChunk
from service.heartbeat import StopReason, StopRequested
from service.job import EventLevel, Job, JobStatus, Method
from service.reproduction import NoEngine, Reproducer, find_version_anywhere
from service.tuning import Outcome, TuningRun, TuningServices
from service.tuning_worker import TuningWorker
from tests.service.tuning_fixtures import QUICK, Workshop, medlars, workshop

__all__ = ["workshop"]

ONCE = replace(QUICK, n_epochs=1, lora_r=4, batch_size=16)
NUM_ROWS = 100


@pytest.fixture(scope="module")
def tiny_base(tiny_llama_dir: Path) -> BaseModel:
    """The workshop's base, quantized here."""
    return load_base_model(str(tiny_llama_dir), quantization="nf4", device="cpu", name="tiny")


def _services(workshop: Workshop, **changed: Any) -> TuningServices:
    return replace(workshop.services, drift_run_length=500.0, **changed)


def _run(workshop: Workshop, check: Callable[[], None] = lambda: None, **changed: Any) -> Outcome:
    return TuningRun(_services(workshop, **changed), workshop.control.claim(), check).execute()


def _conversations(count: int = NUM_ROWS) -> list[object]:
    """Two turns each, of which the second is learned; one in ten begins like another."""
    rows: list[object] = []
    for i in range(count):
        question = f"which fruit has number {i - i % 10 if i % 10 == 9 else i}, {'please ' * (i % 7)}?"
        rows.append(
            {
                "messages": [
                    {"role": "system", "content": "You know trees."},
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": f"wait {i}", "weight": 0},
                    {"role": "user", "content": f"well, {i}?"},
                    {"role": "assistant", "content": "a medlar"},
                ]
            }
        )
    return rows


def _first_turns(base: BaseModel, rows: list[Any]) -> list[list[int]]:
    """Each once, in the order of the rows."""
    rendered = [base.render_chat(row["messages"][:2]) for row in rows]
    return [list(tokens) for tokens in dict.fromkeys(map(tuple, rendered))]


def _direct(base: BaseModel, tokens: list[int]) -> tuple[NDArray[np.float32], float]:
    """By transformers, on the quantized base, the whole prompt at once: embedding and mean -log p."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        output = base.model(input_ids=ids, output_hidden_states=True)
    mean = output.hidden_states[-1][0].double().mean(dim=0)
    log_p = torch.log_softmax(output.logits[0].double(), dim=-1)
    nll = -log_p[:-1].gather(1, ids[0, 1:, None]).mean()
    return (mean / mean.norm()).float().numpy(), float(nll)


def _reference(workshop: Workshop, job: Job) -> DriftReference | None:
    return read_reference(workshop.store.read(workshop.digest(job)))


def _said(workshop: Workshop, job: Job, word: str = "rift reference") -> list[str]:
    return [message for message in workshop.messages(job) if word in message]


@pytest.mark.slow
def test_a_job_leaves_a_reference_of_what_transformers_computes_on_the_quantized_base(
    workshop: Workshop, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    rows = _conversations()
    job = workshop.submit(rows, hyperparameters=ONCE)
    worker = TuningWorker(_services(workshop), name="worker", poll_seconds=0.02)
    worker.start()
    try:
        workshop.await_state(job, JobStatus.SUCCEEDED, 120)
    finally:
        worker.stop()
    reference = _reference(workshop, job)
    assert reference is not None
    assert (reference.basis, reference.run_length) == (drift_basis(workshop.base), 500.0)

    prompts = _first_turns(workshop.base, rows)  # those of the validation examples are not among the training's
    vectors, nlls = zip(*(_direct(workshop.base, tokens) for tokens in prompts), strict=True)
    candidates = reference.project(np.stack(vectors))
    distances = np.linalg.norm(reference.points[:, None] - candidates[None], axis=-1)
    nearest = distances.argmin(axis=1)
    spread = float(np.median(np.linalg.norm(candidates[:, None] - candidates[None], axis=-1)))
    assert distances.min(axis=1).max() < 0.05 * spread, "each point is one of the prompts"
    assert len(set(nearest)) == len(reference.points) > 50, "and each prompt is there once"
    kept_lengths = sorted(len(prompts[at]) for at in nearest)
    assert reference.scalars["prompt_length"].values.tolist() == kept_lengths
    np.testing.assert_allclose(reference.scalars["prompt_nll"].values, sorted(nlls[at] for at in nearest), rtol=5e-3)

    [told] = _said(workshop, job)
    assert "one false alarm in 500 prompts is expected" in told and " s (" in told
    version = workshop.control.registry.version(workshop.control.acme.id, str(workshop.job(job).fine_tuned_model))
    facts = version.metrics["drift_reference"]
    assert len(reference.points) < facts["num_prompts"] <= len(prompts) and facts["embedding_seconds"] > 0
    manifest = workshop.store.manifest(version.digest)
    card = make_card(version, moves=[], active=[], files=manifest, url="https://service.example")
    shown = card["measurement"]["drift_reference"]
    assert (shown["made"], shown["num_prompts"], shown["run_length"]) == (True, facts["num_prompts"], 500.0)
    assert "one false alarm in 500 observed prompts" in shown["promise"]
    assert {"drift.json", "drift.safetensors"} < manifest.keys()

    directory = tmp_path / "adapter"
    directory.mkdir()
    for name, content in workshop.store.read(version.digest).items():
        (directory / name).write_bytes(content)
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama_dir), str(directory))  # minds no other files
    assert workshop.answer("word 5?", version.digest) is not None
    job = workshop.submit(rows, parent_digest=version.digest, hyperparameters=replace(ONCE, lora_r="auto"))
    assert TuningRun(workshop.services, workshop.control.claim(), lambda: None).execute() is Outcome.SUCCEEDED
    assert _reference(workshop, job) is None, "a continued adapter has its own, or none"


@pytest.mark.slow
def test_a_preference_job_leaves_one_too_and_the_same_job_leaves_the_same_bytes(workshop: Workshop) -> None:
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"word {i}?"}]},
            "preferred_output": [{"role": "assistant", "content": "a medlar"}],
            "non_preferred_output": [{"role": "assistant", "content": "one plum"}],
        }
        for i in range(NUM_ROWS)
    ]
    jobs = [workshop.submit(list(rows), method=Method.DPO, hyperparameters=ONCE) for _ in range(2)]
    for _ in jobs:
        assert _run(workshop) is Outcome.SUCCEEDED
    reference = _reference(workshop, jobs[0])
    assert reference is not None
    assert set(reference.scalars["prompt_length"].values) <= {
        float(len(workshop.base.render_chat([{"role": "user", "content": f"word {i}?"}]))) for i in (5, 55)
    }
    assert workshop.digest(jobs[0]) == workshop.digest(jobs[1])


@pytest.mark.slow
def test_too_few_prompts_are_told_and_leave_no_reference(workshop: Workshop) -> None:
    job = workshop.submit(medlars(24), hyperparameters=ONCE)
    assert _run(workshop) is Outcome.SUCCEEDED
    [told] = _said(workshop, job)
    assert told.startswith("No drift reference: 20 different prompts are too few, 64 are needed.")
    page = workshop.control.jobs.events(workshop.control.acme.id, job.id, limit=1000)
    assert {event.level for event in page.items if event.message == told} == {EventLevel.INFO}
    assert _reference(workshop, job) is None
    version = workshop.control.registry.version(workshop.control.acme.id, str(workshop.job(job).fine_tuned_model))
    card = make_card(version, moves=[], active=[], files=None, url="https://service.example")
    assert card["measurement"]["drift_reference"]["made"] is False


@pytest.mark.slow
def test_an_engine_that_cannot_answer_costs_the_reference_but_not_the_job(workshop: Workshop) -> None:
    job = workshop.submit(medlars(NUM_ROWS), hyperparameters=ONCE)
    assert _run(workshop, engine=NoEngine()) is Outcome.SUCCEEDED
    [told] = _said(workshop, job)
    assert told.startswith("The drift reference could not be made: ")
    assert _reference(workshop, job) is None


@pytest.mark.slow
def test_a_job_that_is_paused_while_the_reference_is_made_goes_on_to_the_very_same_bytes(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = medlars(NUM_ROWS)
    straight = workshop.submit(rows, hyperparameters=ONCE)
    assert _run(workshop) is Outcome.SUCCEEDED
    job = workshop.submit(rows, hyperparameters=ONCE)
    claim = workshop.control.claim()
    workshop.control.jobs.pause(workshop.control.acme.id, job.id)
    stops = [False]

    def probing(*given: Any) -> list[OutputChunk]:
        stops[0] = True  # from here on, whoever is asked to stop hears it through `check`
        return probe_prompts(*given)

    def check() -> None:
        if stops[0]:
            raise StopRequested(StopReason.PAUSED)

    monkeypatch.setattr("service.drift_reference.probe_prompts", probing)
    assert TuningRun(_services(workshop), claim, check).execute() is Outcome.PAUSED
    monkeypatch.undo()
    workshop.await_that(lambda: workshop.engine.stats().num_running == 0)
    workshop.control.jobs.resume(workshop.control.acme.id, job.id)
    assert _run(workshop) is Outcome.SUCCEEDED
    assert _said(workshop, job, "Resuming from step")
    assert workshop.digest(job) == workshop.digest(straight)
    assert _reference(workshop, job) is not None


@pytest.mark.slow
def test_an_adapter_with_a_reference_is_still_reproduced_byte_for_byte(workshop: Workshop) -> None:
    job = workshop.submit(medlars(NUM_ROWS), hyperparameters=ONCE)
    assert _run(workshop) is Outcome.SUCCEEDED
    version = find_version_anywhere(workshop.control.database, str(workshop.job(job).fine_tuned_model))
    again = Reproducer(version, workshop.control.files, workshop.store).run(workshop.base)
    assert again.same and again.digest != again.expected == version.digest
    manifest = workshop.store.manifest(version.digest)
    assert again.learned == {
        name: manifest[name]["sha256"] for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert version.provenance is not None
    note = {**version.provenance, "job": {**version.provenance["job"]}}
    note["job"]["spec"] = {**note["job"]["spec"], "seed": 4}
    other = Reproducer(replace(version, provenance=note), workshop.control.files, workshop.store).run(workshop.base)
    assert not other.same and other.learned == {}
    workshop.store.delete(version.digest)
    lost = Reproducer(version, workshop.control.files, workshop.store).run(workshop.base)
    assert not lost.same, "without its list of files, nothing proves what it had learned"


class Prober:
    """An engine that embeds at once; remembers what it was asked."""

    def __init__(self, nll: float | None = 1.0) -> None:
        self.nll = nll
        self.requests: list[GenerationRequest] = []

    def submit(self, request: GenerationRequest, on_chunk: Callable[[OutputChunk], None]) -> None:
        self.requests.append(request)
        vector = np.random.default_rng(len(self.requests)).normal(size=16).astype(np.float32)
        on_chunk(OutputChunk("", (), None, FinishReason.STOP, 1, 0, embedding=vector, prompt_nll=self.nll))

    def abort(self, request_id: str) -> None:
        raise AssertionError("everything was answered")


def _made(base: BaseModel, engine: Prober, examples: list[Example], seed: int = 3) -> DriftReference:
    claim: Any = SimpleNamespace(job=SimpleNamespace(tenant_id="acme", spec=SimpleNamespace(seed=seed)))
    workplace: Any = SimpleNamespace(base=base, engine=engine, drift_run_length=500.0)
    files: Any = SimpleNamespace(trained=lambda data, count: examples[:count])
    data: Any = None
    said: list[str] = []
    made = TuningReference(workplace, claim, lambda: None, lambda message, *_, **__: said.append(message)).make(
        files, data
    )
    assert made is not None, said
    return made.reference


def _chat(number: int, turns: int = 1) -> ChatExample:
    messages = [Message("user", f"number {number}")]
    for turn in range(turns):
        messages += [Message("assistant", f"answer {turn}", trained=True), Message("user", f"and {turn}?")]
    return ChatExample(number, (*messages, Message("assistant", "the last", trained=True)))


def test_only_first_turns_are_probed_each_once_behind_everybody_and_without_an_adapter(tiny_base: BaseModel) -> None:
    engine = Prober()
    examples: list[Example] = [_chat(number % 80, turns=number % 3) for number in range(240)]
    _made(tiny_base, engine, examples)
    expected = {tuple(tiny_base.render_chat([{"role": "user", "content": f"number {n}"}])) for n in range(80)}
    assert {request.prompt_token_ids for request in engine.requests} == expected
    assert len(engine.requests) == len(expected)
    assert {(r.adapter, r.tenant, r.pooling, r.measure) for r in engine.requests} == {(None, "acme/drift", True, True)}
    assert all(request.priority < 0 for request in engine.requests)


@pytest.mark.slow
def test_prompts_are_chosen_by_seed_and_bounded_in_number(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def build_reference(embeddings: NDArray[np.float32], *_: Any, seed: int, **__: Any) -> Any:
        seen.append((len(embeddings), seed))
        return SimpleNamespace(points=embeddings)

    monkeypatch.setattr("service.drift_reference.build_reference", build_reference)
    examples: list[Example] = [CompletionExample(i, f"tree {i}", "x") for i in range(MAX_PROMPTS + 200)]
    engines = [Prober(), Prober(), Prober()]
    for engine, seed in zip(engines, (1, 1, 2), strict=True):
        _made(tiny_base, engine, examples, seed)
    assert seen == [(MAX_PROMPTS, 1), (MAX_PROMPTS, 1), (MAX_PROMPTS, 2)]
    asked = [{request.prompt_token_ids for request in engine.requests} for engine in engines]
    assert asked[0] == asked[1] != asked[2]


def test_long_prompts_are_cut_as_those_of_traffic_and_their_lengths_are_the_whole_ones(tiny_base: BaseModel) -> None:
    engine = Prober()
    examples: list[Example] = [CompletionExample(i, "tree " * 600 + f"{i}", "x") for i in range(70)]
    reference = _made(tiny_base, engine, examples)
    assert {len(request.prompt_token_ids) for request in engine.requests} == {MAX_PROMPT_TOKENS}
    assert reference.scalars["prompt_length"].values.min() > MAX_PROMPT_TOKENS


def test_prompts_that_are_the_same_behind_the_cut_count_once(tiny_base: BaseModel) -> None:
    engine = Prober()
    examples: list[Example] = [CompletionExample(i, f"{i} " + "tree " * 600, "x") for i in range(70)]
    examples += [_chat(number) for number in range(70)]
    _made(tiny_base, engine, examples)
    assert len(engine.requests) == 71


def test_a_base_that_cannot_tell_surprise_has_a_reference_without_it(tiny_base: BaseModel) -> None:
    examples: list[Example] = [_chat(number) for number in range(80)]
    assert set(_made(tiny_base, Prober(nll=None), examples).scalars) == {"prompt_length"}
