"""What lasts beyond a process: rows, files and adapters, opened as the settings say. Knows no engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from adapters.steps import Reached, unwatched
from adapters.store import AdapterStore
from service.config import Settings
from service.database import Database, connect
from service.fault_points import fault_point
from service.files import Files


@dataclass(frozen=True)
class Archive:
    """`url` is where files and adapters are, as fsspec understands it; `reached` hears of the steps of what is done
    with all this (see `service.fault_points`)."""

    database: Database
    files: Files
    store: AdapterStore
    url: str
    reached: Reached = unwatched

    @classmethod
    @contextmanager
    def open(cls, settings: Settings, on_damage: Callable[[str], None] = lambda reason: None) -> Iterator[Self]:
        """`on_damage` as of AdapterStore. Raises ServiceError when the database cannot be used."""
        reached = fault_point(os.environ)
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        database = connect(settings.resolved_database_url)
        url = settings.resolved_storage_url.rstrip("/")
        try:
            files = Files(database, f"{url}/files", max_bytes=settings.max_file_bytes)
            cache = settings.data_dir / "cache" / "adapters"
            store = AdapterStore(f"{url}/adapters", cache, reached, on_damage=on_damage)
            yield cls(database, files, store, url, reached)
        finally:
            database.close()
