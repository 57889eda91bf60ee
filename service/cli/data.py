"""`rootstock data`: what is wrong with a file of examples. Reads it here: needs no service, sends nothing away."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from service.cli.client import REFUSED, USAGE, console, fail, interactive
from service.config import BUNDLED_BASE

if TYPE_CHECKING:
    from adapters.data_report import DataReport, Finding, Source

app = typer.Typer(help="Look at training data before training on it.", no_args_is_help=True)

_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}
MAX_SHOWN_LINES = 6


@app.callback()
def data() -> None:
    """Look at training data before training on it."""


@app.command("report")
def report(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Examples as JSONL.")],
    validation: Annotated[
        Path | None, typer.Option("--validation", exists=True, dir_okay=False, help="Held-out examples as JSONL.")
    ] = None,
    base: Annotated[
        str, typer.Option(envvar="ROOTSTOCK_BASE", help="The model to count tokens for: a directory or a hub id.")
    ] = str(BUNDLED_BASE),
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Say what is wrong with a file of examples. Exit status 1 when there are errors."""
    from adapters.data_report import Base, make_report  # imports that take seconds
    from service.engine.errors import BaseModelError
    from service.engine.text_base import load_text_base

    try:
        text_base = load_text_base(base)
    except BaseModelError as error:
        fail(error.message, USAGE)
    sources: list[Source] = [_source(path) for path in (file, validation) if path is not None]
    with console.status("reading") if interactive() and not as_json else nullcontext():
        made = make_report(*sources, base=Base(text_base, text_base.max_model_len, text_base.added_tokens))
    if as_json:
        print(json.dumps(made.as_dict(), ensure_ascii=False, indent=2))
    else:
        _show(made)
    if made.has_errors:
        raise typer.Exit(REFUSED)


def _source(path: Path) -> Source:
    return lambda: path.open("rb")


def _show(made: DataReport) -> None:
    if made.findings:
        table = Table("severity", "finding", "count", "lines", "what to do", show_lines=True)
        for finding in made.findings:
            table.add_row(*_cells(finding), style=_COLOURS[finding.severity])
        console.print(table)
    for name in ("training", "validation"):
        statistics = made.statistics.get(name)
        if statistics is not None:
            console.print(f"{name}: {_described(statistics)}")
    far = made.statistics.get("representativeness")
    if far is not None:
        console.print(
            f"validation against training: AUC {far['auc']:.2f}"
            f" (random splits reach {far['auc_of_random_splits_p95']:.2f}; 0.5: alike, 1: apart)"
        )
    console.print(made.summary())


def _cells(finding: Finding) -> tuple[str, ...]:
    lines = ", ".join(map(str, finding.lines[:MAX_SHOWN_LINES]))
    more = ", …" if finding.count > MAX_SHOWN_LINES and finding.lines else ""
    file = "" if finding.file == "training_file" else " (validation)"
    advice = "\n".join([finding.advice, *(f"  {excerpt}" for excerpt in finding.excerpts)])
    return (finding.severity.value, finding.code + file, str(finding.count), lines + more, advice)


def _described(statistics: dict[str, Any]) -> str:
    parts = [f"{statistics['num_examples']} examples"]
    if statistics["num_bad_lines"]:
        parts.append(f"{statistics['num_bad_lines']} bad lines")
    if "outputs" in statistics:
        labels = statistics["labels"]
        parts.append(f"outputs are {statistics['outputs']}" + (f" ({labels['num_labels']})" if labels else ""))
        lengths = (statistics["tokens"] or {}).get("example")
        if lengths:
            parts.append(f"tokens: {lengths['p50']:g} median, {lengths['p95']:g} p95, {lengths['max']} longest")
        languages = statistics["languages"]["input"]
        if languages:
            parts.append("languages: " + ", ".join(f"{name} {count}" for name, count in languages.items()))
    return "; ".join(parts)
