"""What k8s/monitoring/ holds, read without Prometheus: names, links, thresholds, and what Grafana needs of its JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics.requests import TPOT_BUCKETS, TTFT_BUCKETS
from tests.metric_names import known, series
from tests.monitoring.queries import (
    DASHBOARDS,
    MONITORING,
    ROOT,
    Expression,
    chosen,
    dashboard,
    groups,
    of_dashboards,
    of_rules,
    panels,
    rules,
    variables,
)
from tools.monitoring.__main__ import files
from tools.monitoring.objectives import FIRST_TOKEN_SECONDS, INTER_TOKEN_SECONDS, OBJECTIVES

OUR_OWN = {rule["record"] for rule in rules("record")} | {"up", "ALERTS"}
"""What Prometheus makes itself."""
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
RUNBOOK_PARTS = ("**What users feel.**", "**First look.**", "**Likely causes.**", "**What to do.**")
UIDS = {path.stem for path in DASHBOARDS}


def alerts() -> list[dict[str, Any]]:
    return rules("alert")


def test_the_committed_files_are_what_their_source_makes() -> None:
    for path, contents in files().items():
        assert (MONITORING / path).read_text() == contents, f"{path}: `make monitoring` was not run"
    assert {path.name for path in DASHBOARDS} == {Path(name).name for name in files() if name.endswith(".json")}


def test_the_operators_resource_holds_the_very_rules_that_promtool_checks() -> None:
    assert yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text())["spec"]["groups"] == groups()


@pytest.mark.parametrize("expression", [*of_rules(), *of_dashboards()], ids=lambda e: str(e.where))
def test_an_expression_parses_and_names_only_metrics_that_exist(expression: Expression) -> None:
    assert expression.metrics - OUR_OWN <= series(known())


def test_the_values_to_choose_from_are_those_of_metrics_that_exist() -> None:
    for path in DASHBOARDS:
        for selector, _ in variables(path):
            assert Expression("", selector, {}).metrics <= series(known())


def test_objectives_are_counted_at_a_buckets_boundary() -> None:
    assert float(FIRST_TOKEN_SECONDS) in TTFT_BUCKETS and float(INTER_TOKEN_SECONDS) in TPOT_BUCKETS
    boundaries = set(re.findall(r'_seconds_bucket\{[^}]*le="([^"]+)"', "".join(e.expr for e in of_rules())))
    assert boundaries == {FIRST_TOKEN_SECONDS, INTER_TOKEN_SECONDS, "0.1"}  # the last is the event loop's


def test_every_objective_has_the_four_pairs_of_windows() -> None:
    for objective in OBJECTIVES:
        found = [rule for rule in alerts() if rule["alert"] == objective.alert]
        speeds = {(r["labels"]["burn"], r["labels"]["window"], r["labels"]["severity"]) for r in found}
        assert speeds == {("14.4", "1h", "page"), ("6", "6h", "page"), ("3", "1d", "ticket"), ("1", "3d", "ticket")}


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: f"{rule['alert']}-{rule['labels'].get('burn', '')}")
def test_an_alert_says_how_bad_it_is_and_leads_to_its_dashboard_and_runbook(rule: dict[str, Any]) -> None:
    notes = rule["annotations"]
    assert rule["labels"]["severity"] in ("page", "ticket") and notes["summary"] and notes["description"]
    uid, _, query = notes["dashboard_url"].partition("/d/")[2].partition("?")
    assert uid in UIDS and query.startswith("var-job=")
    page, _, anchor = notes["runbook_url"].partition("#")
    assert page.endswith("docs/operations.md") and f"\n### {rule['alert']}\n" in OPERATIONS
    assert anchor == rule["alert"].lower()
    if re.search(r"by \([^)]*\btenant\b", rule["expr"]):
        assert "{{ $labels.tenant }}" in notes["summary"] and "&var-tenant=" in query


def test_the_variables_that_links_set_exist_on_the_dashboards_they_lead_to() -> None:
    for rule in alerts():
        uid, _, query = rule["annotations"]["dashboard_url"].partition("/d/")[2].partition("?")
        names = {
            variable["name"] for variable in dashboard(MONITORING / "dashboards" / f"{uid}.json")["templating"]["list"]
        }
        assert set(re.findall(r"var-(\w+)=", query)) <= names


def test_every_runbook_section_belongs_to_an_alert_and_has_all_its_parts() -> None:
    runbook = OPERATIONS.partition("\n## Runbook\n")[2].partition("\n## ")[0]
    sections = {section.partition("\n")[0]: section for section in runbook.split("\n### ")[1:]}
    assert set(sections) == {rule["alert"] for rule in alerts()}
    for name, section in sections.items():
        assert [section.count(part) for part in RUNBOOK_PARTS] == [1, 1, 1, 1], name


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: str(path.stem))
def test_a_dashboard_has_what_grafana_needs(path: Path) -> None:
    document = dashboard(path)
    assert document["uid"] == path.stem and document["schemaVersion"] >= 36 and document["title"]
    names = [variable["name"] for variable in document["templating"]["list"]]
    assert names[:2] == ["datasource", "job"] and len(names) == len(set(names))
    ids = [panel["id"] for panel in document["panels"]]
    assert len(ids) == len(set(ids)) and min(ids) > 0
    assert len(json.dumps(document)) < 200_000  # `kubectl apply` keeps a copy in an annotation of 256 KiB at most


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: str(path.stem))
def test_every_panel_says_what_it_shows_in_which_unit_and_names_each_line(path: Path) -> None:
    for panel in panels(path):
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"] and panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["legendFormat"] and target["datasource"]["uid"] == "${datasource}"
            assert target["instant"] is not target["range"]
            by = _labels_kept(target["expr"])
            assert by is None or set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= by, panel["title"]


def _labels_kept(expr: str) -> set[str] | None:
    """Of an expression that begins with an aggregation."""
    match = re.match(r"(?:topk\(10, )?(?:sum|max|count) by \(([^)]*)\)", expr)
    return None if match is None else {label.strip() for label in match[1].split(",")}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: str(path.stem))
def test_panels_fill_the_width_and_do_not_overlap(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard(path)["panels"]:
        place = panel["gridPos"]
        columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in lines}
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    widths = {sum(1 for x in range(24) if (x, y) in taken) for y in {y for _, y in taken}}
    assert min(widths) >= 23


def test_histograms_of_latency_show_the_traces_of_single_requests() -> None:
    """Exemplars hang on buckets: a panel of a recorded series would show none."""
    marked = [e for e in of_dashboards() if e.target.get("exemplar")]
    assert all(any(name.endswith("_seconds_bucket") for name in e.metrics) for e in marked)
    latencies = {name for e in marked for name in e.metrics}
    assert latencies == {
        "rootstock_time_to_first_token_seconds_bucket",
        "rootstock_time_per_output_token_seconds_bucket",
        "rootstock_request_duration_seconds_bucket",
        "rootstock_queue_wait_seconds_bucket",
    }


def test_from_the_alert_a_link_leads_to_the_tenant_and_from_any_panel_of_tenants_too() -> None:
    service = {panel["title"]: panel for panel in panels(MONITORING / "dashboards" / "rootstock-service.json")}
    tenants = {panel["title"]: panel for panel in panels(MONITORING / "dashboards" / "rootstock-tenants.json")}
    linked = [
        *_urls(service["Firing now"]),
        *_urls(service["Busiest tenants"]),
        *_urls(tenants["Tenants in the time shown"]),
        *_urls(tenants["States"]),
        *_urls(tenants["Statistic ÷ threshold"]),
    ]
    assert len(linked) == 5
    for url in linked:
        assert url.startswith("/d/rootstock-tenants?") and re.search(r"&var-tenant=\$\{__(field|value)", url)


def _urls(panel: dict[str, Any]) -> list[str]:
    config = panel["fieldConfig"]
    own = [link["url"] for link in config["defaults"]["links"]]
    properties = [p for override in config["overrides"] for p in override["properties"]]
    return own + [link["url"] for p in properties if p["id"] == "links" for link in p["value"]]


def test_a_table_of_tenants_has_a_column_for_each_query_and_a_row_for_each_tenant() -> None:
    (table,) = [p for path in DASHBOARDS for p in panels(path) if p["title"] == "Tenants in the time shown"]
    join, kept, organized = table["transformations"]
    assert join["options"]["byField"] == "tenant"
    renamed = organized["options"]["renameByName"]
    assert list(renamed.values()) == [target["legendFormat"] for target in table["targets"]]
    assert kept["options"]["include"]["names"] == ["tenant", *renamed]
    assert {override["matcher"]["options"] for override in table["fieldConfig"]["overrides"]} <= {
        "tenant",
        *renamed.values(),
    }


def test_grafanas_variables_are_the_dashboards_own() -> None:
    for path in DASHBOARDS:
        names = {variable["name"] for variable in dashboard(path)["templating"]["list"]}
        for panel in panels(path):
            used = {name for t in panel["targets"] for name in re.findall(r"\$(\w+)", t["expr"])}
            assert {name for name in used if not name.startswith("__")} <= names
            assert all("$" not in chosen(target["expr"]) for target in panel["targets"])
