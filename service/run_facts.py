"""The facts of a training run that its adapter's note keeps: enough to train it again. Knows no row.

Threads and the processor's instruction set are among them: float sums taken in another order round differently.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from adapters.corpus import Corpus
from adapters.trainer import Trainer
from service.base_facts import base_facts
from service.engine.base_model import BaseModel
from service.errors import NotFoundError
from service.files import Files
from service.job import Job
from service.tuning_data import TuningData

PACKAGES = ("rootstock", "torch", "transformers", "tokenizers", "bitsandbytes", "safetensors")


def facts_of_run(base: BaseModel, files: Files, job: Job, data: TuningData, trainer: Trainer) -> dict[str, Any]:
    """JSON values."""
    return {
        "origin": "job",
        "job": {"id": job.id, "created_at": job.created_at, "spec": job.spec.as_dict()},
        "data": {
            "training_file": _file(files, job.tenant_id, job.spec.training_file),
            "validation_file": _file(files, job.tenant_id, job.spec.validation_file),
            "train": _counts(data.train),
            "valid": _counts(data.valid),
        },
        "lora": asdict(trainer.adapter.spec),
        "recipe": asdict(trainer.config),
        "base": {**base_facts(base), "dtype": str(base.dtype).removeprefix("torch.")},
        "software": software_facts(),
        "compute": compute_facts(base.device),
    }


def software_facts() -> dict[str, str | None]:
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def compute_facts(device: torch.device) -> dict[str, Any]:
    """Of the calling thread: torch's number of threads is a setting of each."""
    return {
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _counts(corpus: Corpus) -> dict[str, int]:
    return {
        "num_examples": len(torch.unique(corpus.lines)),
        "num_sequences": len(corpus),
        "num_tokens": corpus.num_tokens,
        "num_truncated": corpus.num_truncated,
    }


def _file(files: Files, tenant_id: str, file_id: str | None) -> dict[str, Any] | None:
    if file_id is None:
        return None
    try:
        file = files.get(tenant_id, file_id)
    except NotFoundError:  # cannot be deleted while the job runs, so only when the tenant goes
        return {"id": file_id}
    return {"id": file.id, "filename": file.filename, "bytes": file.bytes, "sha256": file.sha256}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
