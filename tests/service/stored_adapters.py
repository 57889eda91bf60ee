"""Adapters in a store beside the tests' control plane: small files that nothing computes, and how they are damaged."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from adapters.manifest import MANIFEST
from adapters.store import AdapterStore
from service.garbage import Garbage
from service.resume_points import ResumePoints
from tests.service.control_fixtures import Control

OLD = 10 * 86400.0


class Shelf:
    """A store in `directory`, and versions of `control` whose bytes are there."""

    def __init__(self, control: Control, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.control = control
        self.root = directory / "adapters"
        self.store = AdapterStore(str(self.root), directory / "cache")
        self.points = ResumePoints(str(directory))
        self._directory = directory

    def upload(self, weights: str) -> str:
        """As a publisher does before its row; the digest."""
        made = self._directory / f"made-{weights}"
        if not made.is_dir():
            made.mkdir()
            (made / "adapter_config.json").write_text("{}")
            (made / "adapter_model.safetensors").write_text(weights)
        return self.store.publish(made)

    def version(self, weights: str, **spec: Any) -> tuple[str, str]:
        """Model and digest of a job that published these weights."""
        digest = self.upload(weights)
        return self.control.publish(digest=digest, suffix=weights, **spec), digest

    def damage(self, digest: str) -> None:
        path = self.root / "sha256" / digest / "adapter_model.safetensors"
        content = bytearray(path.read_bytes())
        content[0] ^= 1
        path.write_bytes(bytes(content))

    def age(self, *paths: Path) -> None:
        """Everything that is stored, or these, by ten days."""
        then = time.time() - OLD
        for path in paths or [*self._directory.rglob("*")]:
            os.utime(path, (then, then))

    def age_adapter(self, digest: str) -> None:
        self.age(self.root / "sha256" / digest / MANIFEST)

    def garbage(self, **options: object) -> Garbage:
        return Garbage(
            self.control.database,
            self.store,
            self.control.files,
            self.points,
            grace_seconds=86400.0,
            **options,  # type: ignore[arg-type]
        )
