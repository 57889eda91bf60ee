"""The project as somebody else gets it: the wheel's content, the lock, the Makefile, the files that must exist."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.config import BUNDLED_BASE
from tools.audit_lock import complaints
from tools.lock import closure, project_requirements

ROOT = Path(__file__).resolve().parent.parent
PINNED_BY_ANOTHER = {
    "pydantic-core",  # pydantic wants exactly one version of it
    "triton",  # torch's CUDA build brings its own; the CPU does without
}
NEEDED_UNIMPORTED = {
    "httptools",  # uvicorn's fast parser
    "python-multipart",  # Starlette's forms
    "uvloop",  # uvicorn's fast loop
}


def project() -> dict[str, Any]:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    table: dict[str, Any] = document["project"]
    return table


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in the built wheel."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = directory.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_holds_both_packages_and_the_bundled_base_where_the_service_looks(wheel: list[str]) -> None:
    assert BUNDLED_BASE == ROOT / "bases" / "tiny"
    for name in ("service/config.py", "adapters/lora.py", "bases/tiny/config.json", "bases/tiny/model.safetensors"):
        assert name in wheel


def test_the_wheel_holds_nothing_that_is_not_needed_to_run(wheel: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info" not in name} == {"service", "adapters", "bases"}


def test_what_the_packages_import_is_what_the_project_asks_for() -> None:
    graph = grimp.build_graph("service", "adapters", include_external_packages=True)
    imported = {name for name in graph.modules if graph.is_module_squashed(name)} - set(sys.stdlib_module_names)
    distributions = packages_distributions()
    asked = {canonicalize_name(Requirement(line).name) for line in project()["dependencies"]}
    needed: set[str] = set()
    for name in imported:
        owners = [canonicalize_name(owner) for owner in distributions[name]]
        needed |= asked.intersection(owners) or {owners[0]}  # several share a namespace: opentelemetry
    assert needed - PINNED_BY_ANOTHER | NEEDED_UNIMPORTED == asked


def test_every_requirement_is_locked_within_its_range() -> None:
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    for requirement in (Requirement(line) for group in groups for line in group):
        version = locked()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}"


def test_everything_the_project_needs_here_directly_or_not_is_locked_at_the_installed_version() -> None:
    pinned = {name: version.public for name, version in closure(project_requirements()).items()}
    assert pinned.items() <= locked().items()


def test_the_lock_names_no_local_build_so_that_cpu_and_cuda_share_it() -> None:
    assert not [name for name, version in locked().items() if "+" in version]
    assert locked()["torch"] == "2.13.0"


@pytest.mark.slow
def test_the_console_script_is_there() -> None:
    assert project()["scripts"] == {"rootstock": "service.cli:main"}
    command = Path(sys.executable).with_name("rootstock")
    result = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "serve" in result.stdout


def test_ci_and_pre_commit_call_what_people_call() -> None:
    assert "make --no-print-directory test" in (ROOT / ".ci" / "run").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    assert {"install", "demo", "serve", "check", "test", "bench", "bench-quick"} <= makefile_targets()


def test_make_help_explains_every_target_a_person_would_call() -> None:
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    explained = set(re.findall(r"^  make (\S+)", result.stdout, re.MULTILINE))
    assert explained == makefile_targets() - {"lint", "fast"}


def test_the_lock_is_exact_and_every_licence_known() -> None:
    assert complaints((ROOT / "requirements.lock").read_text().splitlines()) == []


@pytest.mark.parametrize("line", ["httpx>=0.1", "httpx @ https://x/y.whl", "httpx==0.0.1", "httpx==1.0rc1", "httpx==x"])
def test_a_loose_a_foreign_and_an_unreleased_pin_are_complained_about(line: str) -> None:
    assert complaints([line])
