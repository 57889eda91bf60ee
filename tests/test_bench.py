"""The benchmark on a micro model: its entries, its file and its document. Nothing here looks at a clock."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import curve, memory, report, results, tiers
from bench.__main__ import NAMES
from bench.goals import goal
from bench.measurement import Goal, interleave, quantity, ratio
from bench.plan import Plan
from bench.probe import QUANTITIES, quantile_bound
from bench.registered import registered
from bench.run import MEASUREMENTS, run
from bench.subject import Sizes, prepare

MICRO = Sizes(hidden=64, layers=2, ffn=128, heads=2, kv_heads=1, vocabulary=512, positions=128, r=4)
FIELDS = {"name", "value", "low", "high", "unit", "rounds", "ratio", "goal", "met", "reference"}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """One run of the decode measurement, as a file would hold it."""
    plan = replace(Plan.quick(cuda=False), sizes=MICRO, num_rows=4, decode_tokens=4)
    return results.collect(plan, True, run(plan, ["decode"], lambda step: None)).as_dict()


def test_a_run_holds_every_variant_and_every_ratio(found: dict[str, Any]) -> None:
    (entries,) = found["sections"].values()
    assert all(entry.keys() == FIELDS for entry in entries)
    measured = {entry["name"]: entry for entry in entries}
    assert [name for name, entry in measured.items() if entry["ratio"] is None] == [
        "base.decode",
        "measured.decode",
        "idle.decode",
        "one.decode",
        "8 distinct.decode",
        "32 distinct.decode",
    ]
    assert [name for name, entry in measured.items() if entry["ratio"]] == [
        "idle ÷ base",
        "measured ÷ base",
        "one ÷ base",
        "8 distinct ÷ base",
        "32 distinct ÷ base",
        "32 distinct ÷ one",
    ]
    assert all(0 < entry["low"] <= entry["value"] <= entry["high"] for entry in entries)
    assert measured["32 distinct ÷ base"]["goal"] == "≥ 0.75"


def test_a_results_file_describes_the_machine_but_does_not_name_it(found: dict[str, Any]) -> None:
    machine = found["machine"]
    assert {"cpu", "cores", "torch", "device", "kind"} <= machine.keys()
    text = json.dumps(found)
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text


def test_what_is_written_is_what_the_newest_file_says(tmp_path: Path) -> None:
    sections = {"Decode": [quantity("base.decode", {"base.decode": [2.0, 4.0, 3.0]}, "tokens/s")]}
    written = results.collect(Plan.quick(cuda=False), False, sections)
    replace(written, date="2026-01-01", sections={}).write(tmp_path)
    path = written.write(tmp_path)
    assert path.name == written.file_name
    assert results.newest(tmp_path) == written.as_dict()
    assert results.newest(tmp_path / "nothing here") is None


def test_the_table_on_the_terminal_shows_every_entry(found: dict[str, Any]) -> None:
    console = Console(record=True, width=200)
    report.show(found, console)
    shown = console.export_text()
    for entries in found["sections"].values():
        assert all(entry["name"].replace(".", ", ") in shown for entry in entries)


def test_a_ratio_is_the_median_of_its_rounds_and_knows_its_goal() -> None:
    rounds = iter([1.0, 2.0, 9.0, 10.0, 4.0, 5.0])
    samples = interleave({"a": lambda: {"x": next(rounds)}, "b": lambda: {"x": next(rounds)}}, 3, lambda step: None)
    assert samples == {"a.x": [1.0, 10.0, 4.0], "b.x": [2.0, 9.0, 5.0]}, "every other round in the other order"
    entry = ratio("a ÷ b", samples, "a.x", "b.x", Goal("≥", 0.75, "somebody"))
    assert (entry.value, entry.low, entry.high, entry.ratio) == (0.8, 0.5, 10 / 9, "a.x ÷ b.x")
    assert entry.goal is not None and entry.goal.met(entry.value)
    assert not Goal("≤", 1.25, "nobody").met(1.26)


def test_the_command_offers_every_measurement_by_name() -> None:
    assert list(NAMES) == list(MEASUREMENTS)


def test_the_document_is_replaced_between_its_marks_only(found: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_document(found, page)
    assert page.read_text() == f"before\n{report.BEGIN}\n{report.markdown(found)}\n{report.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"page\.md lacks the marks"):
        report.write_document(found, page)


def test_the_document_carries_the_numbers_of_the_newest_file() -> None:
    newest = results.newest()
    generated = f"{report.markdown(newest)}\n" if newest else ""
    assert f"{report.BEGIN}\n{generated}{report.END}" in report.DOCUMENT.read_text()
    assert newest is None or not newest["quick"]


@pytest.mark.slow
def test_every_row_of_the_tiers_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "LONG_ANSWER_TOKENS", 40)
    plan = replace(Plan.quick(cuda=False), sizes=MICRO, num_rows=32, tier_registered=40)
    (entries,) = run(plan, ["tiers"], lambda step: None).values()
    with_goals = {entry.name: str(entry.goal) for entry in entries if entry.goal}
    assert with_goals == {
        "first token, 2 adapters per slot ÷ 1": "≤ 2",
        "p99 between tokens during swaps ÷ before": "≤ 1.1",
        "p99 first token beside a flood ÷ alone, 1 client": "≤ 2",
        "p99 first token beside a flood ÷ alone, 8 clients": "≤ 2",
    }
    assert all(0 < entry.low <= entry.value <= entry.high for entry in entries)
    assert "40 registered ÷ 5 registered" in [entry.name for entry in entries]
    assert goal("2000 registered ÷ 5 registered", cuda=False) is not None


def test_a_shared_beginning_is_measured_reused_and_computed() -> None:
    plan = replace(Plan.quick(cuda=False), sizes=MICRO, num_rows=2, prefix_tokens=80)
    (entries,) = run(plan, ["prefix"], lambda step: None).values()
    assert [entry.name for entry in entries] == [
        "prefix computed.first token",
        "prefix reused.first token",
        "first token, shared prefix reused ÷ computed",
    ]
    assert all(entry.value > 0 for entry in entries)


def test_the_bound_of_a_quantile_is_that_of_the_bucket_it_lies_in() -> None:
    cumulative = {0.001: 98.0, 0.005: 99.0, 0.01: 100.0, float("inf"): 100.0}
    assert quantile_bound(cumulative, 0.5) == 0.001
    assert quantile_bound(cumulative, 0.99) == 0.005
    assert quantile_bound(cumulative, 1.0) == 0.01
    with pytest.raises(ValueError, match="counted nothing"):
        quantile_bound(dict.fromkeys(cumulative, 0.0), 0.99)


@pytest.mark.slow
def test_the_service_is_probed_while_idle_and_while_saturated() -> None:
    plan = replace(Plan.quick(cuda=False), sizes=MICRO, num_rows=32, streaming_tokens=4)
    (entries,) = run(plan, ["http"], lambda step: None).values()
    measured = {entry.name: entry for entry in entries}
    for load in ("service idle", "engine saturated"):
        for name in QUANTITIES:
            assert measured[f"{load}.{name}"].value > 0
    assert "HTTP ÷ engine" in measured


def test_every_registered_adapter_is_found_and_can_be_read(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    subject = prepare(base, MICRO, 1)
    models = tmp_path / "models"
    models.mkdir()
    with registered(subject, models, 12) as found:
        digests = [found.digest(number) for number in range(12)]
        assert len(set(digests)) == 12
        assert all(found.load(digest).max_rank == 8 for digest in digests)


def test_the_curve_is_one_table_of_its_points_and_only_goals_stand_below_it() -> None:
    samples = {"a.p99": [30.0], "b.p99": [20.0]}
    entries = [
        ratio(curve.name(what, load, arm), samples, "a.p99", "b.p99", goal(curve.name(what, load, arm), cuda=False))
        for load in (100, 25)
        for arm in ("priorities", "target")
        for what in curve.COLUMNS
    ]
    sections = {"Beside": [quantity("a.p99", samples, "ms"), *entries]}
    written = results.collect(Plan.quick(cuda=False), True, sections).as_dict()
    head, rows = curve.table(written["sections"]["Beside"]) or ([], [])
    assert head == [
        "load",
        *("priorities: p99 ÷ no training", "priorities: training kept"),
        *("target: p99 ÷ no training", "target: training kept"),
    ]
    assert [row[0] for row in rows] == ["25 %", "100 %"]
    assert all(cell == "1.50" for row in rows for cell in row[1:])
    text = report.markdown(written)
    assert "| 25 % | 1.50 | 1.50 | 1.50 | 1.50 |" in text
    assert "**p99 ÷ no training, 25 % load, target**" in text
    assert "**p99 ÷ no training, 25 % load, priorities**" not in text
    assert curve.table(written["sections"]["Beside"][:1]) is None


@pytest.mark.slow
def test_training_beside_serving_is_measured_at_every_load_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "NUM_STEPS", 1)
    plan = replace(Plan.quick(cuda=False), sizes=MICRO, num_rows=1, co_serving_seconds=0.2, co_serving_loads=(25, 100))
    (entries,) = run(plan, ["co-serving"], lambda step: None).values()
    measured = {entry.name: entry for entry in entries}
    for load in plan.co_serving_loads:
        for arm in ("priorities", "target", "lock"):
            assert measured[curve.name("p99 ÷ no training", load, arm)].value > 0
            for what in ("training kept", "training kept ÷ idle part"):
                assert measured[curve.name(what, load, arm)].value >= 0  # a micro model's steps may all be late
    assert measured["training kept, 0 % load, target"].value > 0
    assert measured[memory.RATIO].value > 0
    assert measured["a second QLoRA process.memory"].value > measured["what training adds.memory"].value > 0
