"""What the watch for drift costs a request: one service that watches some answers and not others, to the same prompts.

Its adapter has a reference; every prompt is a conversation of its own, so every prompt is measured. Clients ask again
at once: what measuring leaves for the gaps between requests has no gaps to hide in but its own.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from adapters.drift.build import build_reference
from adapters.drift.reference import DriftReference, write_reference
from adapters.peft_format import write_adapter
from bench.goals import goal
from bench.half_watched import UNWATCHED
from bench.measurement import Entry, interleave, quantity, ratio
from bench.plan import Plan
from bench.processes import Process, Running, chat_body, converse, running_clients, started_service
from bench.registered import job_row
from bench.serving import serving
from bench.subject import Subject
from service.archive import Archive
from service.background_generation import probe_prompts
from service.config import Settings
from service.drift_prompt import drift_basis
from service.tables import jobs
from service.tenants import Tenants
from service.versions import AdapterVersion, insert_version

MODEL = "ft:watched"
HALF_WATCHED = ("-m", "bench.half_watched")
NUM_REFERENCE = 200
NUM_BASELINE = 200
"""Answers until the monitors of answers are calibrated; that happens once, before anything is timed."""
QUANTITIES = {"first token": "ms", "answer": "ms", "computing": "ms"}
"""Until they arrive; and what the service's processes compute meanwhile for each answer, which tells small costs that
the clock does not: on a busy machine answers differ by a quarter."""
PATIENCE_SECONDS = 300.0
ARMS = {"watched": None, "not watched": UNWATCHED}
"""The `user` of their requests."""


def measure(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """Rounds of a few requests in a row; a quantity is the mean over them, so a rare collision is in it."""
    prompts = _prompts(random.Random(1))
    with ExitStack() as stack:
        clients = stack.enter_context(running_clients())
        tick("making the reference and starting the service")
        service = _service(subject, plan, stack, [next(prompts) for _ in range(NUM_REFERENCE)])
        for number in range(NUM_BASELINE if plan.watching_baseline else 1):
            tick(f"usual traffic {number}")
            converse(clients, service, _bodies([next(prompts)], plan, None))
        _wait(lambda: _is_settled(service) and (not plan.watching_baseline or _is_calibrated(service)))
        before = _measured(service)
        entries: list[Entry] = []
        for num_clients in (1, plan.watching_clients):
            samples = _rounds(service, clients, prompts, num_clients, plan, tick)
            beside = f", {num_clients} client{'s' if num_clients > 1 else ''}"
            for arm in ARMS:
                entries += [quantity(f"{arm}{beside}.{what}", samples, unit) for what, unit in QUANTITIES.items()]
            for what in QUANTITIES:
                name = f"{what} watched ÷ not{beside}"
                of = (f"watched{beside}.{what}", f"not watched{beside}.{what}")
                entries.append(ratio(name, samples, *of, goal(name, cuda=subject.is_cuda)))
        measured, spent = (after - then for after, then in zip(_measured(service), before, strict=True))
    per_prompt = {"a prompt.measuring": [spent / measured * 1e3]}
    return [*entries, quantity("a prompt.measuring", per_prompt, "ms")]


def _rounds(
    service: Running,
    clients: Process,
    prompts: Iterator[str],
    num_clients: int,
    plan: Plan,
    tick: Callable[[str], None],
) -> Mapping[str, list[float]]:
    """Within a round both arms get the same prompts; neither begins before the watch has nothing left to do."""
    asked: dict[int, list[list[str]]] = {}

    def variant(arm: str) -> Callable[[], Mapping[str, float]]:
        turn = iter(range(plan.watching_rounds))

        def once() -> Mapping[str, float]:
            batches = asked.setdefault(
                next(turn), [[next(prompts) for _ in range(num_clients)] for _ in range(plan.watching_requests)]
            )
            before = service.cpu_seconds()
            answers = [converse(clients, service, _bodies(batch, plan, ARMS[arm])) for batch in batches]
            computed = (service.cpu_seconds() - before) / (len(batches) * num_clients)
            _wait(lambda: _is_settled(service))
            first = fmean(fmean(answer["first_text_seconds"]) for answer in answers)
            whole = fmean(answer["seconds"] for answer in answers)
            return {"first token": first * 1e3, "answer": whole * 1e3, "computing": computed * 1e3}

        return once

    beside = f", {num_clients} client{'s' if num_clients > 1 else ''}"
    forth = interleave({f"{arm}{beside}": variant(arm) for arm in ARMS}, plan.watching_rounds, tick)
    return {name: list(values) for name, values in forth.items()}


def _service(subject: Subject, plan: Plan, stack: ExitStack, prompts: list[str]) -> Running:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rootstock-bench-")))
    key = _prepare(directory / "data", directory / "adapter", subject, _reference(subject, prompts))
    started = started_service(subject, plan, directory / "data", ["--no-training"], "bench" * 8, HALF_WATCHED)
    return Running(*stack.enter_context(started), key)


def _reference(subject: Subject, prompts: list[str]) -> DriftReference:
    """As a job makes it: what the base makes of each prompt."""
    base = subject.base
    tokens = [tuple(base.render_chat([{"role": "user", "content": prompt}])) for prompt in prompts]
    with serving(base, {}, max_num_seqs=8) as rig:
        chunks = probe_prompts(rig.engine, "bench", tokens, lambda: None)
    embeddings = np.stack([chunk.embedding for chunk in chunks if chunk.embedding is not None])
    scalars = {
        "prompt_length": np.array([float(len(prompt)) for prompt in tokens]),
        "prompt_nll": np.array([chunk.prompt_nll for chunk in chunks], dtype=np.float64),
    }
    basis, run_length = drift_basis(base), Settings().drift_run_length
    return build_reference(embeddings, scalars, basis=basis, run_length=run_length, seed=1, check=lambda: None)


def _prepare(data_dir: Path, built: Path, subject: Subject, reference: DriftReference) -> str:
    """A tenant with one adapter; its key."""
    write_adapter(built, subject.adapters["0"], base_name="bench", base=subject.base.signature)
    write_reference(built, reference)
    with Archive.open(Settings(data_dir=data_dir)) as archive:
        digest = archive.store.publish(built)
        tenant, key = Tenants(archive.database).create("bench")
        with archive.database.begin() as connection:
            connection.execute(jobs.insert().values(**job_row(tenant.id)))
            version = AdapterVersion(MODEL, tenant.id, digest, "job", "bench", subject.base.fingerprint, {})
            insert_version(connection, version)
    return key


def _prompts(rng: random.Random) -> Iterator[str]:
    """Never the same twice, all of one kind; with the template 50 to 90 tokens."""
    while True:
        yield " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(rng.randint(8, 12)))


def _bodies(prompts: list[str], plan: Plan, user: str | None) -> list[dict[str, object]]:
    named = {} if user is None else {"user": user}
    return [chat_body(MODEL, prompt, plan.watching_tokens) | named for prompt in prompts]


def _is_settled(service: Running) -> bool:
    """Nothing waits to be measured: twice the same."""
    first = _measured(service)
    time.sleep(0.15)
    return first == _measured(service)


def _is_calibrated(service: Running) -> bool:
    answer = httpx.get(f"{service.url}/drift/{MODEL}", headers={"authorization": f"Bearer {service.key}"})
    signals = answer.raise_for_status().json()["signals"]
    return {one["state"] for one in signals if one["signal"] == "answer_nll"} != {"insufficient_data"}


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the watch for drift is never done")
        time.sleep(0.05)


def _measured(service: Running) -> tuple[float, float]:
    """Prompts that were measured, and the seconds that took."""
    text = httpx.get(f"{service.ops_url}/metrics").raise_for_status().text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    number = sum(
        s.value for s in samples if s.name == "rootstock_drift_probes_total" and s.labels["outcome"] == "measured"
    )
    return number, sum(s.value for s in samples if s.name == "rootstock_drift_probe_seconds_total")
