"""`rootstock retraining list|approve|dismiss`: what drift, falling quality or a wish has proposed to train again."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from service.cli.client import DEFAULT_URL, ApiKey, Url, as_tenant, console
from service.cli.tenants import shown_time

app = typer.Typer(help="Look at proposals to retrain, and decide.", no_args_is_help=True)

RetrainingId = Annotated[str, typer.Argument(help="As `list` shows it.")]


@app.command("list")
def list_(url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """List the proposals, newest first."""
    with as_tenant(url, api_key) as service:
        proposals = service.get("/retraining", limit=100)["data"]
    for proposal in proposals:
        of = proposal["alias"] or proposal["model"]
        console.print(f"{proposal['id']}  {shown_time(proposal['created_at'])}  {proposal['status']}")
        console.print(f"    {of}, by {proposal['trigger']}: {proposal['reason']}")
        if note := _next(proposal):
            console.print(f"    {note}")


@app.command("approve")
def approve(retraining_id: RetrainingId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Start the job of a proposal."""
    with as_tenant(url, api_key) as service:
        proposal = service.call("POST", f"/retraining/{retraining_id}/approve")
    console.print(f"started  {proposal['job']}")


@app.command("dismiss")
def dismiss(retraining_id: RetrainingId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """End a proposal without a job."""
    with as_tenant(url, api_key) as service:
        service.call("POST", f"/retraining/{retraining_id}/dismiss")
    console.print(f"dismissed {retraining_id}")


def _next(proposal: dict[str, Any]) -> str:
    """What is awaited, or what came of it."""
    outcome = proposal["outcome"]
    if outcome is not None:
        moved = {True: ", the alias moved", False: ", held by the gate", None: ""}[outcome["alias_moved"]]
        return f"job {outcome['status']}{moved}"
    if proposal["status"] == "proposed":
        return f"approve or dismiss ({proposal['counts']['corrected']} corrected answers)"
    return str(proposal["missing"] or (proposal["error"] or {}).get("message", ""))
