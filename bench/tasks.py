"""`python -m bench.tasks`: what a fine-tuned adapter gains on a task, against the base and against prompting alone.

The whole way of a tenant: a service in this process, the files and the job through its API, its own evaluation on rows
that the training never saw. Knows the API and the report, not the trainer.

A task is a folder with `train.jsonl` and `validation.jsonl` of rows `{"input", "output", "meta"}`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.5
ADMIN_KEY = "the-key-of-this-bench"
CONTESTANTS = {"base": "base", "few_shot": "few-shot", "candidate": "adapter"}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """`where`: only rows whose meta has these values. `epochs` None: as the service chooses."""

    data: Path
    task: str
    examples: int
    held_out: int
    shots: int
    epochs: int | None
    learning_rate: float | None
    max_seconds: float
    seed: int
    where: Mapping[str, str]
    base: Path | None


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here comes from a hub
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rootstock-tasks-") as directory:
        job, report = asyncio.run(_fine_tune(options, Path(directory)))
    print(table(options.task, report))
    print(f"\n{_circumstances(options, job, report)} {time.monotonic() - started:.0f} s in all.")


async def _fine_tune(options: Options, directory: Path) -> tuple[Row, Row]:
    """The finished job and its evaluation, as the API answers them."""
    import httpx
    import structlog
    from pydantic import SecretStr

    from service.app import create_app, open_services
    from service.config import Settings
    from service.metrics import Metrics

    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # the table is all that is printed
    chosen: dict[str, Any] = {"data_dir": directory} | ({"base": str(options.base)} if options.base else {})
    opening = open_services(Settings(**chosen), Metrics(), SecretStr(ADMIN_KEY))
    services = await asyncio.to_thread(opening.__enter__)
    try:
        transport = httpx.ASGITransport(create_app(services))
        async with httpx.AsyncClient(transport=transport, base_url="http://bench", timeout=600) as client:
            made = await client.post(
                "/v1/admin/tenants", json={"name": "bench"}, headers={"authorization": f"Bearer {ADMIN_KEY}"}
            )
            client.headers["authorization"] = f"Bearer {_body(made)['api_key']}"
            return await _run_job(client, options, services.base.name)
    finally:
        await asyncio.to_thread(opening.__exit__, None, None, None)


async def _run_job(client: Any, options: Options, base: str) -> tuple[Row, Row]:
    train, held_out = await _upload(client, options, "train"), await _upload(client, options, "validation")
    asked = {"n_epochs": options.epochs, "learning_rate": options.learning_rate}
    body = {
        "model": base,
        "training_file": train,
        "seed": options.seed,
        "method": {"type": "supervised", "supervised": {"hyperparameters": asked}},
        "evaluation": {
            "file": held_out,
            "max_examples": options.held_out,
            "max_seconds": options.max_seconds,
            "num_shots": options.shots,
        },
    }
    job = _body(await client.post("/v1/fine_tuning/jobs", json=body))
    while job["status"] not in ("succeeded", "failed", "cancelled"):
        await asyncio.sleep(POLL_SECONDS)
        job = _body(await client.get(f"/v1/fine_tuning/jobs/{job['id']}"))
    if job["status"] != "succeeded":
        raise SystemExit(f"the job {job['status']}: {job['error']}")
    report = _body(await client.get(f"/v1/fine_tuning/jobs/{job['id']}/evaluation"))
    if "scores" not in report:
        raise SystemExit("the model could not be evaluated")
    return job, report


async def _upload(client: Any, options: Options, split: str) -> str:
    """The id of the split's rows as chat examples; of the training rows as many as asked for."""
    rows = read_rows(options.data / options.task / f"{split}.jsonl", options.where)
    if split == "train" and len(rows) > options.examples:
        rows = random.Random(options.seed).sample(rows, options.examples)
    content = "".join(json.dumps(as_example(row)) + "\n" for row in rows).encode()
    sent = await client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (f"{split}.jsonl", content)})
    return str(_body(sent)["id"])


def read_rows(path: Path, where: Mapping[str, str]) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row for row in rows if all(row.get("meta", {}).get(name) == value for name, value in where.items())]


def as_example(row: Row) -> dict[str, Any]:
    """The row as a chat; what its meta says in words is there to slice by."""
    messages = [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]
    metadata = {name: value for name, value in (row.get("meta") or {}).items() if isinstance(value, str) and value}
    return {"messages": messages, "metadata": metadata}


def table(task: str, report: Row) -> str:
    """Markdown: a line a metric, 95 % intervals, and the paired p against the better of base and few-shot prompt."""
    lines = [
        f"| {task} ({report['task']}) | {' | '.join(CONTESTANTS.values())} | p against few-shot |",
        "|---|" + "---:|" * (len(CONTESTANTS) + 1),
    ]
    for metric in report["scores"]["candidate"]:
        name = f"**{metric}**" if metric == report["primary"] else metric
        cells = [_cell(report["scores"][contestant][metric]) for contestant in CONTESTANTS]
        lines.append(f"| {name} | {' | '.join(cells)} | {report['comparisons']['few_shot'][metric]['p']:.4f} |")
    return "\n".join(lines)


def _cell(estimate: Row) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _circumstances(options: Options, job: Row, report: Row) -> str:
    forgetting, gate = report["forgetting"], report["gate"]
    said = "; ".join(gate["reasons"]) or "no objection"
    return (
        f"{options.examples} training examples at most, {job['trained_tokens']} tokens trained,"
        f" {report['num_examples']} held-out examples, {report['num_shots']} shots, seed {options.seed}."
        f" Fit: {report['training']['fit']}. Perplexity on general text: x {forgetting['ratio']:.2f}"
        f" [{forgetting['low']:.2f}, {forgetting['high']:.2f}]."
        f" Gate {'passed' if gate['passed'] else 'not passed'}: {said}."
    )


def _body(response: Any) -> Row:
    if response.status_code != 200:
        raise SystemExit(f"{response.request.url.path}: {response.status_code} {response.text}")
    found: Row = response.json()
    return found


def _options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m bench.tasks", description="What an adapter gains on a task.")
    parser.add_argument("--data", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--task", required=True, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--examples", type=int, default=1000, help="training rows, chosen by seed")
    parser.add_argument("--held-out", type=int, default=200, help="rows of validation.jsonl to compare on")
    parser.add_argument("--shots", type=int, default=8, help="training rows in the few-shot prompt")
    parser.add_argument("--epochs", type=int, help="the service's choice when left out")
    parser.add_argument("--learning-rate", type=float, help="the service's choice when left out")
    parser.add_argument("--max-seconds", type=float, default=900.0, help="bound of the comparison")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--where", action="append", default=[], metavar="FIELD=VALUE", help="rows of this meta only")
    parser.add_argument("--base", type=Path, help="another base than the bundled one")
    values = vars(parser.parse_args(arguments))
    values["where"] = dict(pair.split("=", 1) for pair in values["where"])
    return Options(**values)


if __name__ == "__main__":
    main()
