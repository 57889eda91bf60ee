"""Training states on disk (or any fsspec url), from which an interrupted job goes on. Knows bytes, not jobs.

Each attempt of a job writes under its own name, so a worker that lost its lease cannot spoil its successor's state.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from adapters.durable import write_file
from adapters.errors import StoreError
from adapters.storage import make_parents, open_storage, storage_errors, stored_files


class ResumePoints:
    def __init__(self, storage_url: str) -> None:
        """`storage_url` is an fsspec url or a local directory; states go to `training/` in it."""
        self._filesystem, root = open_storage(storage_url)
        self._root = f"{root}/training"

    def save(self, job_id: str, attempt: int, state: dict[str, Any]) -> str:
        """Write the state durably, in place of this attempt's last one; the reference that `load` takes.

        Raises StoreError when the storage does not take it; the last one is still there then.
        """
        import torch  # here, so that who only discards does without it

        reference = f"{job_id}/attempt-{attempt:06d}.pt"
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with storage_errors(f"saving the training state {reference}"):
            if isinstance(self._filesystem, LocalFileSystem):
                write_file(Path(self._root) / reference, [buffer.getvalue()])
            else:
                make_parents(self._filesystem, f"{self._root}/{reference}")
                self._filesystem.pipe_file(f"{self._root}/{reference}", buffer.getvalue())
        return reference

    def load(self, reference: str) -> dict[str, Any]:
        """Raises StoreError when the state is gone or damaged."""
        import torch

        try:
            with self._filesystem.open(f"{self._root}/{reference}", "rb") as stream:
                state: dict[str, Any] = torch.load(io.BytesIO(stream.read()), weights_only=True, map_location="cpu")
        except Exception as error:  # torch.load fails in many ways
            raise StoreError(f"the training state {reference} cannot be read: {error}") from error
        return state

    def stored(self) -> Iterator[tuple[str, float]]:
        """Ids of all jobs of which there are states, and when the newest was written (unix seconds)."""
        newest: dict[str, float] = {}
        for path, modified_at in stored_files(self._filesystem, self._root):
            job_id = path.split("/", 1)[0]
            newest[job_id] = max(modified_at, newest.get(job_id, 0.0))
        return iter(newest.items())

    def discard(self, job_id: str, *, keep: str | None = None) -> None:
        """Remove a job's states, except the one `keep` refers to."""
        directory = f"{self._root}/{job_id}"
        with storage_errors(f"removing the training states of {job_id}"):
            if not self._filesystem.isdir(directory):
                return
            if keep is None:
                self._filesystem.rm(directory, recursive=True)
                return
            for path in self._filesystem.ls(directory, detail=False):
                if path.rsplit("/", 1)[-1] != keep.rsplit("/", 1)[-1]:
                    self._filesystem.rm_file(path)
