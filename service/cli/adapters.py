"""`rootstock adapters list|show|promote|rollback`: a tenant's adapters and the aliases that point at them."""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.table import Table

from service.cli.client import DEFAULT_URL, ApiKey, Url, as_tenant, console
from service.cli.tenants import shown_time

app = typer.Typer(help="A tenant's adapters, and the aliases that point at them.", no_args_is_help=True)

Alias = Annotated[str, typer.Argument(help="The stable name that requests use as their model.")]


@app.command("list")
def list_(url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """List the adapters, newest first."""
    with as_tenant(url, api_key) as service:
        adapters = service.get("/adapters")["data"]
    table = Table("model", "digest", "created", "aliases", box=None)
    for adapter in adapters:
        created = shown_time(adapter["created_at"])
        table.add_row(adapter["id"], adapter["digest"][:12], created, ", ".join(adapter["aliases"]))
    console.print(table)


@app.command("show")
def show(
    model: Annotated[str, typer.Argument(help="A fine-tuned model, a checkpoint or an alias.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Show one adapter: what it is, where it comes from, what was measured."""
    with as_tenant(url, api_key) as service:
        adapter = service.get(f"/adapters/{quote(model, safe='')}")
    adapter["created_at"] = shown_time(adapter["created_at"])
    _print_pairs({**adapter, "aliases": ", ".join(adapter["aliases"])})


@app.command("promote")
def promote(
    alias: Alias,
    model: Annotated[str, typer.Argument(help="The fine-tuned model or checkpoint that the alias shall mean.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Point an alias at a model; the next request that names the alias is answered by it."""
    with as_tenant(url, api_key) as service:
        moved = service.call("PUT", f"/aliases/{quote(alias, safe='')}", json={"model": model})
    console.print(f"{moved['id']} -> {moved['model']}")


@app.command("rollback")
def rollback(alias: Alias, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Point an alias back at what it meant before."""
    with as_tenant(url, api_key) as service:
        moved = service.call("POST", f"/aliases/{quote(alias, safe='')}/rollback")
    console.print(f"{moved['id']} -> {moved['model']}")


def _print_pairs(pairs: dict[str, Any], indent: str = "") -> None:
    """One line for each value; what is nested goes below its name, further in."""
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        if isinstance(value, dict):
            console.print(f"{indent}{name}")
            _print_pairs(value, indent + "  ")
        elif isinstance(value, list):
            console.print(f"{indent}{name}")
            for item in value:
                console.print(f"{indent}  - {json.dumps(item, ensure_ascii=False)}")
        else:
            console.print(f"{indent}{name:<{width}}  {'-' if value is None else value}")
