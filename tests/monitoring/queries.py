"""Every PromQL expression of k8s/monitoring/, as its readers see it: from the rules file and the JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "k8s" / "monitoring"
RULES = MONITORING / "plain" / "rootstock.rules.yml"
DASHBOARDS = sorted((MONITORING / "dashboards").glob("*.json"))
GRAFANAS_OWN = {"$__rate_interval": "30s", "$__range": "5m"}


@dataclass(frozen=True)
class Expression:
    where: str
    expr: str
    """Without Grafana's variables: everything is chosen."""
    target: dict[str, Any]

    @property
    def metrics(self) -> set[str]:
        return set(_names(promql_parser.parse(self.expr)))


def groups() -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
    return listed


def rules(kind: str) -> list[dict[str, Any]]:
    """`kind` is alert or record."""
    return [rule for group in groups() for rule in group["rules"] if kind in rule]


def dashboard(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def panels(path: Path) -> list[dict[str, Any]]:
    """Those that show something: rows are only headings."""
    return [panel for panel in dashboard(path)["panels"] if panel["type"] != "row"]


def of_rules() -> list[Expression]:
    named = [(rule.get("alert") or rule["record"], rule) for group in groups() for rule in group["rules"]]
    return [Expression(name, rule["expr"], rule) for name, rule in named]


def of_dashboards() -> list[Expression]:
    found = []
    for path in DASHBOARDS:
        for panel in panels(path):
            where = f"{path.stem}: {panel['title']}"
            found += [Expression(where, chosen(t["expr"]), t) for t in panel["targets"]]
        found += [Expression(f"{path.stem}: annotations", chosen(a["expr"]), a) for a in _annotations(path)]
    return found


def variables(path: Path) -> Iterator[tuple[str, str]]:
    """Selector and label of each `label_values(selector, label)`."""
    for variable in dashboard(path)["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            assert match is not None, variable
            yield chosen(match[1]), match[2]


def chosen(expr: str) -> str:
    for name, value in GRAFANAS_OWN.items():
        expr = expr.replace(name, value)
    return re.sub(r"\$\w+", ".*", expr)


def _annotations(path: Path) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = dashboard(path)["annotations"]["list"]
    return listed


def _names(expression: promql_parser.Expr) -> list[str]:
    found: list[str] = []

    def visit(node: promql_parser.Expr) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(str(node.name))
        return True

    promql_parser.walk(expression, visit)
    return found
