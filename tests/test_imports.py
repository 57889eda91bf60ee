"""The direction of imports, as a test and not as a habit. The contracts themselves stand in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CONTRACTS = (
    "Imports point one way",
    "adapters knows no tenant, HTTP, Prometheus or SQL",
    "the engine reports through a callback",
    "FastAPI stays in app and api",
    "who runs next and what a job is are decided without tensors",
    "drift is watched in the API's process, without torch",
)


def test_every_import_contract_is_kept() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([linter, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for contract in CONTRACTS:
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(contract)]
        assert line.endswith("KEPT")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["service.engine.scheduler", "service.engine.sequence", "service.jobs"])
def test_deciding_what_runs_next_loads_no_torch(module: str) -> None:
    """Also what a package's __init__ loads on the way, which the contracts cannot see."""
    assert loaded_beside(module, "torch") == []


def test_watching_for_drift_loads_no_torch() -> None:
    assert loaded_beside("adapters.drift.monitor, adapters.drift.build", "torch", "transformers", "scipy") == []


@pytest.mark.slow
def test_adapters_load_no_web_framework_metrics_or_database() -> None:
    modules = "adapters.lora, adapters.store, adapters.trainer, adapters.evaluation, adapters.dataset, adapters.slots"
    assert loaded_beside(modules, "service", "fastapi", "starlette", "prometheus_client", "sqlalchemy") == []


def loaded_beside(modules: str, *unwanted: str) -> list[str]:
    """Which of `unwanted` a fresh interpreter has loaded after importing `modules`."""
    code = f"import sys, {modules}; print(*[name for name in {unwanted!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.split()
