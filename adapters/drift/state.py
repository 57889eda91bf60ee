"""A monitor's memory as bytes: a few arrays and a few facts, with a version. Knows not what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from adapters.errors import DriftReferenceError

VERSION = "1"
Arrays = Mapping[str, NDArray[Any]]


def pack(kind: str, facts: Mapping[str, Any], arrays: Arrays) -> bytes:
    """The same memory gives the same bytes."""
    notes = np.frombuffer(json.dumps({"kind": kind, "version": VERSION, **facts}, sort_keys=True).encode(), np.uint8)
    return save({"facts": notes} | {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)})


def unpack(kind: str, state: bytes) -> tuple[dict[str, Any], Arrays]:
    """Raises DriftReferenceError for what `pack` did not write for this kind and version."""
    try:
        arrays = load(state)
        facts = json.loads(arrays.pop("facts").tobytes())
        if (facts["kind"], facts["version"]) != (kind, VERSION):
            raise ValueError(f"it is the {facts['kind']} state of version {facts['version']}")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DriftReferenceError(f"the kept {kind} state cannot be used: {error}; begin again without it") from error
    return facts, arrays
