"""`rootstock tenants add|list|remove`, for the bearer of the admin key."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from service.cli.client import DEFAULT_URL, AdminKey, Service, Url, as_admin, console, fail

app = typer.Typer(help="Make, list and remove tenants (needs the admin key).", no_args_is_help=True)


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="The tenant's name; part of its models' ids.")],
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = "",
) -> None:
    """Make a tenant. Its API key is shown this once."""
    with as_admin(url, admin_key) as service:
        tenant = service.call("POST", "/admin/tenants", json={"name": name})
    console.print(f"tenant   {tenant['id']}  {tenant['name']}\napi key  {tenant['api_key']}")


@app.command("list")
def list_(url: Url = DEFAULT_URL, admin_key: AdminKey = "") -> None:
    """List the tenants."""
    with as_admin(url, admin_key) as service:
        tenants = service.get("/admin/tenants")["data"]
    table = Table("id", "name", "created", box=None)
    for tenant in tenants:
        table.add_row(tenant["id"], tenant["name"], shown_time(tenant["created_at"]))
    console.print(table)


@app.command("remove")
def remove(
    tenant: Annotated[str, typer.Argument(help="The tenant's id or name.")],
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a tenant with its keys, files, jobs, models and aliases."""
    with as_admin(url, admin_key) as service:
        tenant_id = _tenant_id(service, tenant)
        if not yes:
            typer.confirm(f"Remove {tenant} and everything that is theirs?", abort=True)
        service.call("DELETE", f"/admin/tenants/{tenant_id}")
    console.print(f"removed {tenant_id}")


def _tenant_id(service: Service, wanted: str) -> str:
    for tenant in service.get("/admin/tenants")["data"]:
        if wanted in (tenant["id"], tenant["name"]):
            return str(tenant["id"])
    fail(f"there is no tenant '{wanted}': see `rootstock tenants list`")


def shown_time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
