"""What the demo prints. Knows how things look, not how they come about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tools.demo.comparison import Score
from tools.demo.tenant import Answer
from tools.demo.traffic import Experience

SHOWN_METRICS = (
    "rootstock_requests_total",
    "rootstock_tokens_total",
    "rootstock_jobs_total",
    "rootstock_adapters_resident",
    "rootstock_adapter_slots",
    "rootstock_kv_cache_usage_ratio",
    "rootstock_tenant_requests_total",
)

console = Console(highlight=False)


def step(text: str) -> None:
    console.print(f"[bold green]▸[/] {text}")


def job_progress() -> Progress:
    """One bar for each job, with its state and loss."""
    return Progress(
        TextColumn("  {task.description:<15}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
    )


def answer_progress() -> Progress:
    return Progress(
        TextColumn("  {task.description:<15}"), BarColumn(bar_width=30), MofNCompleteColumn(), console=console
    )


def swap(tenant: str, question: str, before: Answer, after: Answer) -> None:
    """The same request before and after the tenant's adapter was published."""
    console.print(f"  {tenant}: {question}", style="bold", markup=False, soft_wrap=True)
    for answer, style in ((before, "dim"), (after, "")):
        text = " ".join(answer.text.split())
        console.print(f"    {answer.model}\n      {text[:110]}", style=style, markup=False, soft_wrap=True)


def latency(phases: Mapping[str, Experience]) -> None:
    """What users met in each phase."""
    table = Table("phase", "requests", "errors", "p50 inter-token", "p99 inter-token", title="Chat users meanwhile")
    for phase, experience in phases.items():
        times = [f"{1000 * experience.percentile(share):.0f} ms" for share in (0.5, 0.99)]
        table.add_row(phase, str(experience.num_requests), str(len(experience.errors)), *times)
    console.print(table)


def scores(results: Sequence[Score]) -> None:
    """The table the demo is about."""
    table = Table("tenant", "held-out rows", "base", "few-shot prompt", "adapter", title="Exact match on held-out rows")
    for score in results:
        shares = [f"{100 * right / score.num_rows:.0f} %" for right in (score.base, score.few_shot, score.adapter)]
        table.add_row(score.tenant, str(score.num_rows), *shares)
    console.print(table)


def metrics(exposition: str) -> None:
    """The lines of a scrape that tell this story."""
    for line in exposition.splitlines():
        if line.startswith(SHOWN_METRICS):
            console.print(f"  {line}", style="dim", markup=False)
