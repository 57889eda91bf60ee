"""`rootstock adapters reproduce`: train an adapter again beside a data directory, and compare what was learned.

The one client command that loads torch. It reads the data directory and writes nothing there, so the service may run
or be stopped.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.client import REFUSED, USAGE, console, fail
from service.config import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from service.reproduction import Reproduction

Copy = typer.Option(exists=True, dir_okay=False, help="A copy of the file, where the service's own was deleted.")


def reproduce(
    model: Annotated[str, typer.Argument(help="The full id of a fine-tuned model or checkpoint.")],
    data_dir: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="The service's own.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, as for `rootstock serve`.")] = None,
    training_file: Annotated[Path | None, Copy] = None,
    validation_file: Annotated[Path | None, Copy] = None,
) -> None:
    """Train an adapter again from its noted data, recipe and seed: on a CPU the same weights come out, bit for bit.

    Reads the service's data directory (and ROOTSTOCK_DATABASE_URL, ROOTSTOCK_STORAGE_URL) and writes nothing there.
    """
    given = {"training_file": training_file, "validation_file": validation_file}
    overrides: dict[str, Any] = {"data_dir": data_dir, "base": base}
    try:
        settings = load_settings({name: value for name, value in overrides.items() if value is not None})
    except SettingsError as error:
        fail(str(error), USAGE)
    result = _run(settings, model, {role: path for role, path in given.items() if path is not None})
    if result.same:
        told = f"same digest: {result.expected}"
        if result.digest != result.expected:
            files = ", ".join(f"{name} {sha256}" for name, sha256 in result.learned.items())
            told = f"same weights: {files}; the digest {result.expected} covers a drift reference besides"
        console.print(told)
        return
    reasons = "; ".join(result.differences) or "nothing that is noted differs"
    fail(f"another digest: {result.digest} instead of {result.expected} ({reasons})", REFUSED)


def _run(settings: Settings, model: str, given: dict[str, Path]) -> Reproduction:
    from adapters.errors import AdapterError  # torch and transformers: seconds
    from adapters.store import AdapterStore
    from service.database import connect
    from service.engine.base_model import load_base_model
    from service.engine.errors import EngineError
    from service.errors import ServiceError
    from service.files import Files
    from service.reproduction import Reproducer, find_version_anywhere

    url = settings.resolved_database_url
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
        fail(f"there is no database {url}: name the service's --data-dir", USAGE)
    storage = settings.resolved_storage_url.rstrip("/")
    try:
        with closing(connect(url)) as database:
            version = find_version_anywhere(database, model)
            files = Files(database, f"{storage}/files", max_bytes=settings.max_file_bytes)
            store = AdapterStore(f"{storage}/adapters", settings.data_dir / "cache" / "adapters")
            reproducer = Reproducer(version, files, store, given=given, say=console.print)
            reproducer.check()
            wanted = reproducer.base
            loaded = load_base_model(
                settings.base,
                quantization=wanted["quantization"],
                device=settings.device,
                name=wanted["name"],
                max_model_len=wanted["max_model_len"],
            )
            console.print(f"training {version.id} again on {loaded.name}")
            return reproducer.run(loaded)
    except (AdapterError, EngineError, ServiceError) as error:
        fail(error.message, REFUSED)
