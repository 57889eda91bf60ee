"""`rootstock adapters …`: a tenant's adapters: list, show, card, in and out, and the aliases that point at them."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.table import Table

from service.cli.client import DEFAULT_URL, USAGE, ApiKey, Url, as_tenant, console, fail
from service.cli.reproduce import reproduce
from service.cli.tenants import shown_time

app = typer.Typer(help="A tenant's adapters, and the aliases that point at them.", no_args_is_help=True)

app.command("reproduce")(reproduce)

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")

Model = Annotated[str, typer.Argument(help="A fine-tuned model, a checkpoint or an alias.")]
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
    model: Model,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Show one adapter: what it is, where it comes from, what was measured."""
    with as_tenant(url, api_key) as service:
        adapter = service.get(f"/adapters/{quote(model, safe='')}")
    adapter["created_at"] = shown_time(adapter["created_at"])
    _print_pairs({**adapter, "aliases": ", ".join(adapter["aliases"])})


@app.command("card")
def card(model: Model, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Print an adapter's card: data, measurement, history, how to verify an answer."""
    with as_tenant(url, api_key) as service:
        console.print(service.download(f"/adapters/{quote(model, safe='')}/card", format="markdown").decode())


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(exists=True, help="A PEFT directory, or a zip of one.")],
    suffix: Annotated[str, typer.Option(help="Part of the new model's id.")],
    alias: Annotated[str | None, typer.Option(help="Point this alias at it.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Bring in a LoRA adapter that was trained elsewhere for the base that is served."""
    content = _zipped(source) if source.is_dir() else source.read_bytes()
    fields = {"suffix": suffix, **({} if alias is None else {"alias": alias})}
    with as_tenant(url, api_key) as service:
        upload = {"file": (f"{source.stem}.zip", content)}
        adapter = service.call("POST", "/adapters", files=upload, data=fields, timeout=600)
    console.print(f"model   {adapter['id']}\ndigest  {adapter['digest']}")


@app.command("export")
def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="Where to write it.")],
    format: Annotated[str, typer.Option(help="zip (a PEFT directory) or gguf (for llama.cpp).")] = "zip",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Save an adapter as a zip that PEFT understands, or as a GGUF."""
    with as_tenant(url, api_key) as service:
        output.write_bytes(service.download(f"/adapters/{quote(model, safe='')}/export", format=format))
    console.print(f"{output}: {output.stat().st_size} bytes")


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


def _zipped(directory: Path) -> bytes:
    """The two files that make an adapter; whatever else lies beside them stays there."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in PEFT_FILES:
            if not (directory / name).is_file():
                fail(f"{directory} holds no {name}: it is no PEFT directory in safetensors format", USAGE)
            archive.write(directory / name, name)
    return buffer.getvalue()


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
