"""Takes in an adapter that was trained elsewhere: unpack, every check, publish, register. Knows no HTTP.

Which base it is for is settled in this order: the base's fingerprint in the safetensors metadata and the base's name in
`adapter_config.json` must each be the loaded base's where they are given; where neither is, only names and shapes of
its tensors can be compared, and the adapter's card says so (`base_check`).
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from adapters.peft_archive import unpack
from adapters.peft_config import CONFIG_NAME
from adapters.peft_format import base_check, max_weights_bytes, read_adapter
from adapters.store import AdapterStore
from service.base_facts import base_facts
from service.engine.base_description import BaseDescription
from service.errors import InvalidRequestError
from service.provenance import FORMAT
from service.registry import Registry
from service.tenants import Tenant
from service.versions import AdapterVersion

SUFFIX_PATTERN = r"[A-Za-z0-9._-]{1,64}"
_NOTED_OPTIONS = ("base_model_name_or_path", "peft_version", "r", "lora_alpha", "use_rslora", "target_modules")


class AdapterImport:
    """Its collaborators; `max_rank` is the engine's."""

    def __init__(self, registry: Registry, store: AdapterStore, base: BaseDescription, *, max_rank: int) -> None:
        self._registry = registry
        self._store = store
        self._base = base
        self._max_rank = max_rank

    @property
    def max_bytes(self) -> int:
        """No zip of an adapter for this base is longer."""
        return max_weights_bytes(self._base.signature, self._max_rank) + 4 * 1024 * 1024

    def from_zip(
        self, tenant: Tenant, archive: BinaryIO, *, filename: str, suffix: str, alias: str | None = None
    ) -> AdapterVersion:
        """The registered version. The same adapter under the same suffix is the same version: a client may retry.

        Raises AdapterFormatError naming the check that failed, InvalidRequestError for `suffix` or `alias`.
        """
        if not re.fullmatch(SUFFIX_PATTERN, suffix):
            raise InvalidRequestError(
                "'suffix' must be 1 to 64 letters, digits, '.', '_' or '-'.", param="suffix", code="invalid_value"
            )
        received = {"filename": filename, **_measured(archive)}
        with tempfile.TemporaryDirectory(prefix="rootstock-import-") as name:
            directory = Path(name)
            limit = max_weights_bytes(self._base.signature, self._max_rank)
            unpack(archive, directory, max_weights_bytes=limit)
            weights = read_adapter(directory, self._base.signature, max_rank=self._max_rank)
            config = json.loads((directory / CONFIG_NAME).read_text())
            note = {
                "format": FORMAT,
                "origin": "import",
                "received": received,
                "declared": {option: config.get(option) for option in _NOTED_OPTIONS},
                "base_check": base_check(directory),
                "base": base_facts(self._base),
                "num_modules": len(weights.modules),
                "parents": [],
            }
            digest = self._store.publish(directory)
            version = self._registry.publish(self._version(tenant, suffix, digest, note), alias)
            if not self._store.exists(digest):  # a deletion of the same adapter under another name came between
                self._store.publish(directory)
        return version

    def _version(self, tenant: Tenant, suffix: str, digest: str, note: dict[str, Any]) -> AdapterVersion:
        return AdapterVersion(
            id=f"ft:{self._base.name}:{tenant.name}:{suffix}:{digest[:8]}",
            tenant_id=tenant.id,
            digest=digest,
            job_id=None,
            base_model=self._base.name,
            base_fingerprint=self._registry.base.fingerprint,
            metrics={},
            provenance=note,
        )


def _measured(stream: BinaryIO) -> dict[str, Any]:
    stream.seek(0)
    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    return {"sha256": sha256, "bytes": stream.tell()}
