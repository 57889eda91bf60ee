"""What lasts beyond a process: rows, files and adapters, opened as the settings say. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from adapters.store import AdapterStore
from service.config import Settings
from service.database import Database, connect
from service.files import Files


@dataclass(frozen=True)
class Archive:
    """`url` is where files and adapters are, as fsspec understands it."""

    database: Database
    files: Files
    store: AdapterStore
    url: str

    @classmethod
    @contextmanager
    def open(cls, settings: Settings, on_damage: Callable[[str], None] = lambda reason: None) -> Iterator[Self]:
        """`on_damage` as of AdapterStore. Raises ServiceError when the database cannot be used."""
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        database = connect(settings.resolved_database_url)
        url = settings.resolved_storage_url.rstrip("/")
        try:
            files = Files(database, f"{url}/files", max_bytes=settings.max_file_bytes)
            cache = settings.data_dir / "cache" / "adapters"
            yield cls(database, files, AdapterStore(f"{url}/adapters", cache, on_damage=on_damage), url)
        finally:
            database.close()
