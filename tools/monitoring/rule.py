"""Recording rules, alerts and groups as values, and the two forms they are written in. Knows no metric.

`plain` is what Prometheus and promtool read; `custom_resource` the same groups for the Prometheus operator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import dedent
from typing import Any

import yaml

GRAFANA = "https://grafana.example.org"
RUNBOOKS = "https://git.example.org/rootstock/docs/operations.md"
"""Replaced by kustomize with what k8s/monitoring/links.env says."""

SERVICE, TENANTS, TRAINING = "rootstock-service", "rootstock-tenants", "rootstock-training"
"""The dashboards' uids."""

HEADER = "# Written by `make monitoring` from tools/monitoring/; change it there.\n"


@dataclass(frozen=True)
class Recording:
    """A series that Prometheus keeps under a name of its own."""

    record: str
    expr: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        labels = {"labels": dict(self.labels)} if self.labels else {}
        return {"record": self.record, "expr": dedent(self.expr).strip(), **labels}


@dataclass(frozen=True)
class Alert:
    """`page` wakes somebody, `ticket` waits for the morning. The runbook's section is named like the alert."""

    name: str
    severity: str
    expr: str
    summary: str
    description: str
    dashboard: str = SERVICE
    for_: str = "0m"
    labels: Mapping[str, str] = field(default_factory=dict)
    variables: Sequence[str] = ()
    """Labels that the dashboard is opened at, beside the job."""

    def document(self) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": dedent(self.expr).strip(),
            "for": self.for_,
            "labels": {"severity": self.severity, **self.labels},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "dashboard_url": self._dashboard_url(),
                "runbook_url": f"{RUNBOOKS}#{self.name.lower()}",
            },
        }

    def _dashboard_url(self) -> str:
        variables = "&".join(f"var-{name}={{{{ $labels.{name} | urlquery }}}}" for name in ("job", *self.variables))
        return f"{GRAFANA}/d/{self.dashboard}?{variables}"


@dataclass(frozen=True)
class Group:
    """Rules that are evaluated one after another."""

    name: str
    rules: Sequence[Recording | Alert]
    interval: str | None = None

    def document(self) -> dict[str, Any]:
        interval = {"interval": self.interval} if self.interval else {}
        return {"name": self.name, **interval, "rules": [rule.document() for rule in self.rules]}


def plain(groups: Sequence[Group]) -> str:
    return HEADER + _yaml({"groups": [group.document() for group in groups]})


def custom_resource(groups: Sequence[Group]) -> str:
    return HEADER + _yaml(
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": "rootstock"},
            "spec": {"groups": [group.document() for group in groups]},
        }
    )


class _Dumper(yaml.SafeDumper):
    """Expressions of several lines stay several lines."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(document: Any) -> str:
    rendered: str = yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return rendered
