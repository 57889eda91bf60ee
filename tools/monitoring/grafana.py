"""Panels, rows and dashboards as Grafana's JSON (schema of Grafana 10 and newer). Knows no metric.

A dashboard is a list of sections; panels fill a section's width of 24 from the left, lines as high as their first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

SCHEMA_VERSION = 39
WIDTH = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
EVERYTHING = ".*"


@dataclass(frozen=True)
class Query:
    """A PromQL expression and what its series are called; in a table, `legend` is the column."""

    expr: str
    legend: str
    exemplars: bool = False
    """Show the traces of single requests as dots; only with the histogram itself in the expression."""


@dataclass(frozen=True)
class Link:
    title: str
    url: str

    def document(self) -> dict[str, Any]:
        return {"title": self.title, "url": self.url, "targetBlank": False}


@dataclass(frozen=True)
class Panel:
    """`unit` is one of Grafana's ids. `bad_from` colours and draws a threshold."""

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    bad_from: float | None = None
    bad_below: float | None = None
    stacked: bool = False
    links: Sequence[Link] = ()
    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of a table: the column's name and what differs for it (unit, links, …)."""
    key: str = ""
    """Of a table: the label whose values are its rows."""

    def document(self, panel_id: int, x: int, y: int) -> dict[str, Any]:
        return {
            "id": panel_id,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "targets": [self._target(index, query) for index, query in enumerate(self.queries)],
            "fieldConfig": {"defaults": self._defaults(), "overrides": list(self._overrides())},
            "options": _OPTIONS[self.kind],
            "transformations": self._transformations(),
        }

    def _target(self, index: int, query: Query) -> dict[str, Any]:
        instant = self.kind in ("table", "stat")
        return {
            "refId": chr(ord("A") + index),
            "datasource": DATASOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            "exemplar": query.exemplars,
            "instant": instant,
            "range": not instant,
            "format": {"table": "table", "heatmap": "heatmap"}.get(self.kind, "time_series"),
        }

    def _defaults(self) -> dict[str, Any]:
        defaults: dict[str, Any] = {"unit": self.unit, "links": [link.document() for link in self.links]}
        steps = self._steps()
        if steps:
            defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        if self.kind == "timeseries":
            custom: dict[str, Any] = {"fillOpacity": 40 if self.stacked else 5, "showPoints": "never"}
            if self.stacked:
                custom["stacking"] = {"mode": "normal"}
            if steps:
                custom["thresholdsStyle"] = {"mode": "dashed"}
            defaults["custom"] = custom
        if self.kind == "state-timeline":
            defaults["mappings"] = [{"type": "value", "options": _DRIFT_STATES}]
        if self.unit == "percentunit":
            defaults["min"] = 0
        return defaults

    def _steps(self) -> list[dict[str, Any]]:
        if self.bad_from is not None:
            return [{"color": "green", "value": None}, {"color": "red", "value": self.bad_from}]
        if self.bad_below is not None:
            return [{"color": "red", "value": None}, {"color": "green", "value": self.bad_below}]
        return []

    def _overrides(self) -> Iterator[dict[str, Any]]:
        for column, properties in self.columns.items():
            listed = [{"id": name, "value": value} for name, value in properties.items()]
            yield {"matcher": {"id": "byName", "options": column}, "properties": listed}

    def _transformations(self) -> list[dict[str, Any]]:
        """A table's queries side by side, a row for each value of `key`, each column named by its legend."""
        if self.kind != "table":
            return []
        organize = {"excludeByName": {"Time": True, "Value": True}}
        if not self.key:
            return [{"id": "organize", "options": organize}]
        names = {f"Value #{chr(ord('A') + index)}": query.legend for index, query in enumerate(self.queries)}
        return [
            {"id": "joinByField", "options": {"byField": self.key, "mode": "outer"}},
            {"id": "filterFieldsByName", "options": {"include": {"names": [self.key, *names]}}},
            {"id": "organize", "options": {"renameByName": names}},
        ]


_DRIFT_STATES = {
    "0": {"text": "insufficient data", "color": "text"},
    "1": {"text": "ok", "color": "green"},
    "2": {"text": "drift", "color": "red"},
    "3": {"text": "stale reference", "color": "orange"},
}
_TOOLTIP = {"mode": "multi", "sort": "desc"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {"tooltip": _TOOLTIP, "legend": {"displayMode": "list", "placement": "bottom"}},
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"]},
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "auto",
    },
    "table": {"showHeader": True, "cellHeight": "sm"},
    "state-timeline": {"mergeValues": True, "showValue": "never", "rowHeight": 0.8, "tooltip": _TOOLTIP},
    "heatmap": {
        "calculate": False,
        "yAxis": {"unit": "s"},
        "color": {"mode": "scheme", "scheme": "Blues", "steps": 32},
        "exemplars": {"color": "rgba(255,120,0,0.9)"},
    },
}


@dataclass(frozen=True)
class Section:
    """A row of the dashboard and what stands under it."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Variable:
    """`query` is Grafana's `label_values(series, label)`. All values unless some are chosen."""

    name: str
    query: str

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": self.query, "refId": self.name},
            "definition": self.query,
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": EVERYTHING,
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        }


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    description: str
    variables: Sequence[Variable]
    sections: Sequence[Section]
    others: Mapping[str, str]
    """Uid and title of the dashboards one goes on to."""

    def document(self) -> dict[str, Any]:
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["rootstock"],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "timezone": "",
            "refresh": "30s",
            "time": {"from": "now-6h", "to": "now"},
            "templating": {"list": [_DATASOURCES, *(variable.document() for variable in self.variables)]},
            "annotations": {"list": [_FIRING]},
            "links": [_between(uid, title) for uid, title in self.others.items()],
            "panels": list(self._panels()),
        }

    def _panels(self) -> Iterator[dict[str, Any]]:
        panel_id, y = 1, 0
        for section in self.sections:
            row = {"id": panel_id, "type": "row", "title": section.title, "collapsed": False, "panels": []}
            grid = {"gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}}
            yield {**row, **grid}
            panel_id, y, x, height = panel_id + 1, y + 1, 0, 0
            for panel in section.panels:
                if x + panel.width > WIDTH:
                    x, y, height = 0, y + height, 0
                yield replace(panel, height=height or panel.height).document(panel_id, x, y)
                panel_id, x, height = panel_id + 1, x + panel.width, height or panel.height
            y += height


_DATASOURCES = {
    "name": "datasource",
    "label": "Prometheus",
    "type": "datasource",
    "query": "prometheus",
    "refresh": 1,
    "current": {"selected": False, "text": "default", "value": "default"},
}
_FIRING = {
    "name": "Alerts",
    "datasource": DATASOURCE,
    "enable": True,
    "iconColor": "red",
    "expr": 'ALERTS{alertname=~"Rootstock.*",alertstate="firing",job=~"$job"}',
    "titleFormat": "{{alertname}}",
    "textFormat": "{{severity}} {{tenant}}",
    "step": "60s",
}


def _between(uid: str, title: str) -> dict[str, Any]:
    url = f"/d/{uid}?${{datasource:queryparam}}&${{job:queryparam}}"
    return {"type": "link", "title": title, "url": url, "keepTime": True, "targetBlank": False, "icon": "dashboard"}


def quantiles(metric: str, labels: str, by: str = "") -> list[Query]:
    """Median, 95th and 99th percentile of a histogram, with the traces behind them."""
    kept, legend = (f"le, {by}", f"{{{{{by}}}}} ") if by else ("le", "")
    return [
        Query(
            f"histogram_quantile({quantile}, sum by ({kept}) (rate({metric}_bucket{{{labels}}}[$__rate_interval])))",
            f"{legend}p{quantile * 100:.0f}",
            exemplars=True,
        )
        for quantile in (0.5, 0.95, 0.99)
    ]
