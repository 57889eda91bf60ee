"""The rules under promtool: their syntax, and what fires on synthetic series and what does not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.monitoring.queries import MONITORING, RULES, rules
from tests.running_prometheus import binary

UNIT_TESTS = sorted((Path(__file__).parent / "rules").glob("*.test.yml"))
FAST = {"jobs.test.yml", "memory.test.yml"}
"""The others go through hours and days of series."""


def promtool(*arguments: str | Path) -> None:
    result = subprocess.run([binary("promtool"), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_promtool_takes_the_rules() -> None:
    promtool("check", "rules", RULES)


def test_promtool_takes_the_plain_configuration_with_its_rules() -> None:
    promtool("check", "config", MONITORING / "plain" / "prometheus.yml")


def test_alertmanager_takes_the_example_of_routes() -> None:
    amtool = binary("amtool")
    config = MONITORING / "plain" / "alertmanager.yml"
    result = subprocess.run([amtool, "check-config", config], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.name in FAST else [pytest.mark.slow]) for path in UNIT_TESTS],
    ids=lambda path: str(path.name),
)
def test_exactly_the_alerts_that_should_fire_do(path: Path) -> None:
    promtool("test", "rules", path)


def test_every_alert_is_seen_firing_in_a_unit_test() -> None:
    """All cases say exactly what fires, so an alert that stops firing, or fires elsewhere too, fails one of them."""
    wanted = {(rule["alert"], rule["labels"].get("burn")) for rule in rules("alert")}
    fired = "\n".join(labels for path in UNIT_TESTS for labels in _fired(path))
    objectives = {name for name, burn in wanted if burn}
    assert all(f'alertname="{name}"' in fired for name, _ in wanted)
    assert all(f'alertname="RootstockRequestsFail",severity="{s}",burn="{b}"' in fired for s, b in _BURNS)
    assert objectives == {"RootstockRequestsFail", "RootstockFirstTokensLate", "RootstockTokensSlow"}


_BURNS = (("page", "14.4"), ("page", "6"), ("ticket", "3"), ("ticket", "1"))


def _fired(path: Path) -> list[str]:
    cases = yaml.safe_load(path.read_text())["tests"]
    samples = [
        sample
        for case in cases
        for query in case.get("promql_expr_test", [])
        for sample in query.get("exp_samples", [])
    ]
    told = [f'alertname="{told["alertname"]}"' for case in cases for told in case.get("alert_rule_test", [])]
    return [str(sample["labels"]) for sample in samples] + told
