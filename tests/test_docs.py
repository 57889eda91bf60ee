"""The documentation against the code: links, file names, routes and metric names must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from service.api.routes import ROUTERS
from service.config import Settings
from tests.metric_names import known

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def routes() -> set[str]:
    found = set()
    for route in (route for router in ROUTERS for route in router.routes):
        assert isinstance(route, APIRoute)
        found |= {f"{method} {route.path.replace(':path', '')}" for method in route.methods or ()}
    return found


def documented_routes() -> set[str]:
    return set(re.findall(r"^\| `([A-Z]+ /v1/[^`]*)` \|", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_every_source_file_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"`((?:service|adapters|tools|bases|k8s|examples|docs|bench)/[\w./-]*\w)`", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_every_route_is_documented_and_every_documented_route_exists() -> None:
    assert documented_routes() == routes()


def test_every_metric_that_operations_names_is_exported() -> None:
    named = re.findall(r"`(rootstock_\w+)`", (ROOT / "docs" / "operations.md").read_text())
    assert named and set(named) <= set(known())


def test_every_setting_that_operations_names_is_a_setting() -> None:
    flags = re.findall(r"`--(?:no-)?([a-z-]+)", (ROOT / "docs" / "operations.md").read_text())
    unknown = {flag for flag in flags if flag.replace("-", "_") not in Settings.model_fields} - {"gpus"}
    assert flags and not unknown


def test_the_architecture_walks_six_files_for_a_request_and_six_for_a_job() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for walk in re.findall(r"^## The life of .*?(?=^## )", text, re.MULTILINE | re.DOTALL):
        assert [int(number) for number in re.findall(r"^(\d)\. ", walk, re.MULTILINE)] == [1, 2, 3, 4, 5, 6]
        assert all((ROOT / name).exists() for name in re.findall(r"^\d\. `([^`]+)`", walk, re.MULTILINE))
