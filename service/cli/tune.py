"""`rootstock tune`: upload a file, create a fine-tuning job, and watch it. Knows the API, not the trainer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from service.cli.client import DEFAULT_URL, ApiKey, Service, Url, as_tenant, console, fail, interactive
from service.job import Method, Preset

POLL_SECONDS = 0.5
FINAL = frozenset({"succeeded", "failed", "cancelled"})


def tune(
    file: Annotated[Path, typer.Option("--file", exists=True, dir_okay=False, help="Examples as JSONL.")],
    model: Annotated[
        str | None, typer.Option(help="The base, or a model of yours to go on from; the base when left out.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's id.")] = None,
    validation_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Held-out examples; else some are split off.")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Point this alias at the new model when it is there.")] = None,
    method: Annotated[
        Method, typer.Option(help="What the examples are: answers, or pairs of them.")
    ] = Method.SUPERVISED,
    preset: Annotated[
        Preset | None, typer.Option(help="How much is spent on the run; what is asked for below wins.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop when the data report has errors.")] = False,
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Move the alias only if the candidate passes the tenant's gate.")
    ] = True,
    epochs: Annotated[int | None, typer.Option(min=1, max=50, help="Passes over the examples.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, max=256, help="Examples of one step.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same data, same seed, same adapter.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the job ends, showing its progress.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Fine-tune an adapter on a file of examples. Prints the new model's id when it waits for it."""
    hyperparameters = {"n_epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}
    with as_tenant(url, api_key) as service:
        job = _create(
            service,
            {
                "model": model or _base(service),
                "training_file": _upload(service, file),
                "validation_file": validation_file and _upload(service, validation_file),
                "suffix": suffix,
                "seed": seed,
                "alias": alias,
                "strict": strict or None,
                "gate": None if gate else "off",
                "preset": preset,
                "method": {"type": method, method: {"hyperparameters": _given(hyperparameters)}},
            },
        )
        console.print(f"job {job['id']} trains on {file.name}")
        if wait:
            _report(_watch(service, job["id"]))


def _base(service: Service) -> str:
    return str(service.get("/models")["data"][0]["id"])  # the base leads the list


def _upload(service: Service, path: Path) -> str:
    with path.open("rb") as stream:
        uploaded = service.call(
            "POST", "/files", files={"file": (path.name, stream)}, data={"purpose": "fine-tune"}, timeout=600
        )
    return str(uploaded["id"])


def _create(service: Service, fields: Mapping[str, Any]) -> Any:
    return service.call("POST", "/fine_tuning/jobs", json=_given(fields))


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _watch(service: Service, job_id: str) -> Any:
    """Show events as they come, until the job ends; the job as it is then."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
    )
    seen: str | None = None
    with progress if interactive() else nullcontext():
        bar = progress.add_task("queued", total=None, loss="")
        try:
            while True:
                job = service.get(f"/fine_tuning/jobs/{job_id}")
                events = _events_after(service, job_id, seen)
                for event in events:
                    _show(event, progress, bar)
                seen = events[-1]["id"] if events else seen
                progress.update(bar, description="paused" if job.get("paused") else job["status"])
                if job["status"] in FINAL:
                    return job
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            console.print(f"no longer watching; job {job_id} goes on")
            raise typer.Exit(130) from None


def _events_after(service: Service, job_id: str, seen: str | None) -> list[Any]:
    """The events that came after the one with id `seen`, oldest first. The service lists the newest first."""
    events: list[Any] = []
    while True:
        after = events[-1]["id"] if events else None
        page = service.get(f"/fine_tuning/jobs/{job_id}/events", limit=100, after=after)
        for event in page["data"]:
            if event["id"] == seen:
                return events[::-1]
            events.append(event)
        if not page["has_more"]:
            return events[::-1]


def _show(event: Mapping[str, Any], progress: Progress, bar: TaskID) -> None:
    data = event.get("data") or {}
    if event["type"] == "metrics":
        losses = (("loss", data.get("train_loss")), ("valid", data.get("full_valid_loss") or data.get("valid_loss")))
        shown = "  ".join(f"{name} {value:.3f}" for name, value in losses if value is not None)
        progress.update(bar, completed=data.get("step"), total=data.get("total_steps"), loss=shown)
        if interactive():
            return
    colour = {"warn": "yellow", "error": "red"}.get(event["level"])
    console.print(event["message"], style=colour)


def _report(job: Mapping[str, Any]) -> None:
    if job["status"] == "succeeded":
        console.print(f"model {job['fine_tuned_model']}")
        return
    error = job.get("error") or {}
    fail(f"job {job['id']} {job['status']}{': ' + error['message'] if error.get('message') else ''}")
