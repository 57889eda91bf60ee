"""What prompts looked like when an adapter was trained, with thresholds for its tests. Knows no base and no stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from adapters.adapter_files import AdapterSource, content, is_file
from adapters.durable import write_file
from adapters.errors import DriftReferenceError

FORMAT = 1
TENSORS, FACTS = "drift.safetensors", "drift.json"


@dataclass(frozen=True)
class ScalarReference:
    """values: float64 [n], ascending. `allowance` and `threshold` are those of its CUSUM, in standard deviations."""

    values: NDArray[np.float64]
    allowance: float
    threshold: float


@dataclass(frozen=True)
class DriftReference:
    """mean: [d], components: [k, d], points: [n, k], all float32. A point is `components @ (embedding - mean)`.

    `basis` says what the embeddings were made by; a vector of another basis must not be compared. `run_length` is the
    promise that all thresholds together were calibrated for. `thresholds`: by size of window, [window]: for the
    observation with which the window is first full, and the next; the last one for ever after.
    """

    basis: str
    run_length: float
    mean: NDArray[np.float32]
    components: NDArray[np.float32]
    points: NDArray[np.float32]
    bandwidth: float
    thresholds: Mapping[int, NDArray[np.float64]]
    scalars: Mapping[str, ScalarReference]

    def project(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """[d] -> [k], or [n, d] -> [n, k]."""
        return np.asarray((embedding - self.mean) @ self.components.T, dtype=np.float32)


def write_reference(directory: Path, reference: DriftReference) -> None:
    """The same reference gives the same bytes. The facts are written last: without them there is no reference."""
    tensors: dict[str, NDArray[Any]] = {
        "mean": reference.mean,
        "components": reference.components,
        "points": reference.points,
    }
    for window, levels in reference.thresholds.items():
        tensors[f"thresholds.{window}"] = levels
    for name, scalar in reference.scalars.items():
        tensors[f"scalars.{name}"] = scalar.values
    facts = {
        "format": FORMAT,
        "basis": reference.basis,
        "run_length": reference.run_length,
        "bandwidth": reference.bandwidth,
        "windows": sorted(reference.thresholds),
        "scalars": {
            name: {"allowance": scalar.allowance, "threshold": scalar.threshold}
            for name, scalar in sorted(reference.scalars.items())
        },
    }
    write_file(directory / TENSORS, [save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})])
    write_file(directory / FACTS, [json.dumps(facts, indent=2, sort_keys=True).encode() + b"\n"])


def read_reference(source: AdapterSource) -> DriftReference | None:
    """None when the adapter has no reference. Raises DriftReferenceError for one that is torn or of another format."""
    if not is_file(source, FACTS) and not is_file(source, TENSORS):
        return None
    try:
        facts = json.loads(content(source, FACTS))
        if facts["format"] != FORMAT:
            raise DriftReferenceError(f"{FACTS} has format {facts['format']}, and {FORMAT} is known: tune again")
        return _assemble(facts, load(content(source, TENSORS)))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DriftReferenceError(f"the drift reference ({FACTS}, {TENSORS}) is torn: {error}; tune again") from error


def _assemble(facts: Mapping[str, object], tensors: Mapping[str, NDArray[np.float32]]) -> DriftReference:
    windows, scalars, numbers = facts["windows"], facts["scalars"], (facts["run_length"], facts["bandwidth"])
    if not (isinstance(windows, list) and isinstance(scalars, dict)):
        raise TypeError("windows or scalars are of another type")
    run_length, bandwidth = (float(str(number)) for number in numbers)
    mean, components, points = tensors["mean"], tensors["components"], tensors["points"]
    if components.shape[1:] != mean.shape or points.shape[1:] != components.shape[:1]:
        raise ValueError("its tensors do not fit each other")
    return DriftReference(
        str(facts["basis"]),
        run_length,
        mean,
        components,
        points,
        bandwidth,
        {int(window): tensors[f"thresholds.{window}"].astype(np.float64) for window in windows},
        {
            name: ScalarReference(
                tensors[f"scalars.{name}"].astype(np.float64), float(kept["allowance"]), float(kept["threshold"])
            )
            for name, kept in scalars.items()
        },
    )
