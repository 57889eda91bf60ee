"""The Dockerfile, read as Docker would read it: no image is built here, but nothing it names may be missing."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from service.config import Settings

ROOT = Path(__file__).resolve().parent.parent
HADOLINT = Path(sys.executable).with_name("hadolint")
COMPILERS = ("gcc", "g++", "build-essential", "clang", "cmake", "cuda-toolkit", "-devel")


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) pairs with comments gone and continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def final_stage() -> list[tuple[str, str]]:
    found = instructions()
    start = max(index for index, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def copied_from_the_checkout() -> list[str]:
    sources: list[str] = []
    for word, arguments in instructions():
        if word == "COPY" and "--from=" not in arguments:
            sources += arguments.split()[:-1]
    return sources


def test_hadolint_finds_nothing() -> None:
    result = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("source", copied_from_the_checkout())
def test_what_is_copied_exists_and_the_context_lets_it_in(source: str) -> None:
    assert (ROOT / source).exists()
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and fnmatch(source.removeprefix("./").split("/")[0], pattern):
            ignored = not line.startswith("!")
    assert not ignored


def test_the_final_image_runs_as_an_unprivileged_user_that_owns_the_data_volume() -> None:
    stage = dict(final_stage())
    assert stage["USER"] == "10001:10001"
    assert stage["VOLUME"] == '["/data"]'
    assert any(word == "RUN" and "install -d -o 10001 -g 10001 /data" in rest for word, rest in final_stage())


def test_the_final_image_has_no_compiler_and_no_package_cache() -> None:
    commands = " ".join(rest for word, rest in final_stage() if word == "RUN")
    assert not [name for name in COMPILERS if name in commands]
    assert "rm -rf /var/lib/apt/lists/*" in commands
    assert "pip install" not in commands


def test_cuda_is_one_build_argument_away() -> None:
    arguments = {rest.partition("=")[0]: rest.partition("=")[2] for word, rest in instructions() if word == "ARG"}
    assert arguments["TORCH_INDEX"].endswith("/cpu")
    assert arguments["BASE_IMAGE"].startswith("python:3.11-slim")
    installs = [rest for word, rest in instructions() if word == "RUN" and "/opt/rootstock/bin/pip install" in rest]
    assert installs and all("-c requirements.lock" in rest and "${TORCH_INDEX}" in rest for rest in installs)


def test_the_health_check_asks_the_ops_port_for_readiness() -> None:
    stage = dict(final_stage())
    assert "/readyz" in stage["HEALTHCHECK"] and "ROOTSTOCK_OPS_PORT" in stage["HEALTHCHECK"]
    assert "9400" in stage["EXPOSE"].split() and "8000" in stage["EXPOSE"].split()


def test_every_rootstock_variable_of_the_image_is_a_setting() -> None:
    environment = dict(final_stage())["ENV"]
    names = re.findall(r"ROOTSTOCK_(\w+)=", environment)
    assert names and {name.lower() for name in names} <= set(Settings.model_fields)
