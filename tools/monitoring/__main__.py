"""`make monitoring`: write k8s/monitoring's rules and dashboards again."""

from __future__ import annotations

import json
from pathlib import Path

from tools.monitoring.alerts import alert_groups
from tools.monitoring.dashboards import DASHBOARDS
from tools.monitoring.objectives import objective_groups
from tools.monitoring.rule import Group, custom_resource, plain

MONITORING = Path(__file__).resolve().parents[2] / "k8s" / "monitoring"


def groups() -> list[Group]:
    return [*objective_groups(), *alert_groups()]


def files() -> dict[str, str]:
    """What is generated: path below k8s/monitoring and contents."""
    rules = {
        "plain/rootstock.rules.yml": plain(groups()),
        "prometheusrule.yaml": custom_resource(groups()),
    }
    dashboards = {
        f"dashboards/{uid}.json": json.dumps(dashboard, indent=1, ensure_ascii=False) + "\n"
        for uid, dashboard in DASHBOARDS.items()
    }
    return rules | dashboards


def main() -> None:
    for path, contents in files().items():
        (MONITORING / path).write_text(contents, encoding="utf-8")


if __name__ == "__main__":
    main()
