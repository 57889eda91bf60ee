"""The watch over a real database, with monitors whose alarms a test decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import structlog

from service.database import Database, connect
from service.drift import MAX_PROBES_OF_A_STREAM
from service.drift_events import DriftEvent
from service.drift_intake import MAX_WAITING_OF_A_STREAM, Turn
from service.drift_states import SIGNALS, DriftState
from service.drift_streams import DriftStreams
from service.errors import ConflictError, NotFoundError
from service.routing import ResolvedModel
from service.tables import drift_events, drift_states, drift_streams
from tests.service.control_fixtures import Control, make_control
from tests.service.drift_fixtures import (
    DIGEST,
    WINDOW,
    FakeMonitors,
    FakeReference,
    ProbedEngine,
    Watched,
    nowhere,
    wait_until,
    watched,
)

Opens = Callable[..., Watched]
REFUSED = "I'm sorry, but I cannot help with that."


@pytest.fixture
def light(tmp_path: Any) -> Iterator[Control]:
    """A control plane on SQLite alone; the tenants `acme` and `zenith` have the adapter DIGEST."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    url = f"sqlite:///{tmp_path / 'rootstock.db'}"
    database = connect(url)
    yield with_adapters(make_control(database, url, tmp_path / "storage"))
    database.close()


def with_adapters(control: Control) -> Control:
    for tenant in (control.acme, control.zenith):
        control.publish(tenant, digest=DIGEST, suffix="tuned")
    return control


@pytest.fixture
def opened(light: Control) -> Iterator[Opens]:
    """Opens watches that end before the database does."""
    with ExitStack() as stack:

        def open_one(**options: Any) -> Watched:
            one = watched(light, **options)
            stack.callback(one.watch.stop)
            return one

        yield open_one


def fill(one: Watched, tenant_id: str, numbers: range, **what: Any) -> None:
    for number in numbers:
        one.answer(tenant_id, number, **what)
        one.settle()


def state_of(one: Watched, tenant_id: str, signal: str, digest: str = DIGEST) -> DriftState:
    return one.watch.records.get(tenant_id, digest, "").signals[signal].state


def rows(database: Database, table: sa.Table) -> int:
    with database.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def test_one_tenants_shift_is_told_and_the_others_stay_as_they_were(light: Control, opened: Opens) -> None:
    one, told = opened(), list[DriftEvent]()
    one.watch.add_listener(told.append)
    for tenant in (light.acme, light.zenith):
        fill(one, tenant.id, range(2 * WINDOW))
    fill(one, light.acme.id, range(100, 100 + WINDOW), length=200)
    wait_until(lambda: len(told) == 5)
    assert [event.state for event in told].count(DriftState.DRIFT) == 1
    last = told[-1]
    assert (last.tenant_id, last.signal, last.state, last.previous) == (
        light.acme.id,
        "prompt_length",
        DriftState.DRIFT,
        DriftState.OK,
    )
    assert last.statistic is not None and last.threshold == 50.0 and last.statistic > 50.0
    assert state_of(one, light.zenith.id, "prompt_length") is DriftState.OK
    assert one.observer.alarms == {"prompt_length": 1} and one.observer.failures == 0


def test_events_and_states_are_written_on_both_databases(control: Control) -> None:
    one = watched(with_adapters(control))
    try:
        fill(one, control.acme.id, range(WINDOW), text=REFUSED)
        page = one.watch.events.list(control.acme.id, digest=DIGEST, after=None, limit=1)
        assert (page.items[0].state, page.items[0].signal, page.has_more) == (DriftState.OK, "prompt_length", True)
        rest = one.watch.events.list(control.acme.id, digest=None, after=page.items[0].id, limit=5)
        assert [(event.signal, event.state) for event in rest.items] == [("refusal", DriftState.DRIFT)]
        assert state_of(one, control.acme.id, "refusal") is DriftState.DRIFT
        control.tenants.delete(control.acme.id)
        one.watch.forget_deleted(control.acme.id)
        fill(one, control.acme.id, range(50, 52))
        assert [rows(control.database, table) for table in (drift_streams, drift_states, drift_events)] == [0, 0, 0]
    finally:
        one.watch.stop()
    assert one.observer.failures == 0


def test_a_restart_goes_on_where_the_watch_stood(light: Control, opened: Opens) -> None:
    one = opened()
    fill(one, light.acme.id, range(WINDOW - 1), length=200)
    one.watch.stop()
    two = opened()
    fill(two, light.acme.id, range(1), length=200)
    assert two.observer.ended == {"duplicate": 1}, "the prompts that were seen before are known"
    fill(two, light.acme.id, range(100, 101), length=200)
    assert state_of(two, light.acme.id, "prompt_length") is DriftState.DRIFT
    two.watch.stop()
    three = opened()
    wait_until(lambda: bool(three.watch.board.worst(str)))
    assert three.watch.board.worst(str)[light.acme.id].states["prompt_length"] is DriftState.DRIFT


def test_a_kill_loses_some_seconds_at_most(light: Control, opened: Opens) -> None:
    one = opened()
    fill(one, light.acme.id, range(3))
    wait_until(lambda: one.watch.records.get(light.acme.id, DIGEST, "").samples == 3)
    two = opened()  # beside the first, which never got to write what it knows
    fill(two, light.acme.id, range(100, 101), length=200)
    assert two.watch.records.get(light.acme.id, DIGEST, "").signals["prompt_length"].samples == WINDOW


def test_streams_that_were_put_out_of_memory_come_back_as_they_were(light: Control, opened: Opens) -> None:
    light.publish(light.acme, digest="e" * 64, suffix="second")
    one = opened(max_in_memory=1)
    for number in range(WINDOW):
        one.answer(light.acme.id, number, length=200)
        one.answer(light.acme.id, number, digest="e" * 64)
        one.settle()
    assert state_of(one, light.acme.id, "prompt_length") is DriftState.DRIFT
    assert one.watch.records.get(light.acme.id, "e" * 64, "").signals["refusal"].samples == WINDOW


def test_a_reference_of_another_base_is_stale_shows_no_number_and_costs_no_probe(light: Control, opened: Opens) -> None:
    one = opened()
    fill(one, light.acme.id, range(WINDOW), length=200, text=REFUSED)
    assert state_of(one, light.acme.id, "prompt_length") is DriftState.DRIFT
    one.watch.stop()

    two = opened(basis="another base")
    before = two.watch.records.get(light.acme.id, DIGEST, "")
    assert before.signals["prompt_length"].state is DriftState.STALE_REFERENCE, "even before anything came in"
    assert before.signals["refusal"].state is DriftState.INSUFFICIENT_DATA, "answers of one base say nothing of another"
    told = list[DriftEvent]()
    two.watch.add_listener(told.append)
    fill(two, light.acme.id, range(200, 200 + WINDOW - 1))
    view = two.watch.records.get(light.acme.id, DIGEST, "")
    assert {view.signals[name].statistic for name in SIGNALS} == {None} and two.engine.probes == []
    wait_until(lambda: bool(told))
    assert ("prompt_length", DriftState.STALE_REFERENCE) in [(event.signal, event.state) for event in told]
    assert "prompt_length" not in two.watch.board.worst(str)[light.acme.id].ratios
    two.watch.stop()

    three = opened()
    fill(three, light.acme.id, range(300, 301), length=200)
    assert state_of(three, light.acme.id, "prompt_length") is DriftState.DRIFT, "what was known of it is still true"


def test_an_adapter_without_a_reference_has_its_answers_watched(light: Control, opened: Opens) -> None:
    one = opened(monitors=FakeMonitors(references={}))
    fill(one, light.acme.id, range(WINDOW), text=REFUSED)
    assert state_of(one, light.acme.id, "refusal") is DriftState.DRIFT
    assert state_of(one, light.acme.id, "prompt_embedding") is DriftState.INSUFFICIENT_DATA
    assert one.engine.probes == [] and one.observer.failures == 0


def test_an_adapter_whose_files_are_gone_is_watched_as_far_as_that_goes(light: Control, opened: Opens) -> None:
    one = opened(directory=nowhere)
    fill(one, light.acme.id, range(WINDOW))
    assert state_of(one, light.acme.id, "refusal") is DriftState.OK and one.observer.failures == 0


def test_a_state_that_cannot_be_read_begins_again(light: Control, opened: Opens) -> None:
    one = opened()
    fill(one, light.acme.id, range(2))
    one.watch.stop()
    with light.database.begin() as connection:
        connection.execute(drift_streams.update().values(input_state=b"torn"))
    two = opened()
    fill(two, light.acme.id, range(100, 100 + WINDOW))
    assert state_of(two, light.acme.id, "prompt_length") is DriftState.OK


def test_an_acknowledgement_is_kept_with_who_and_why_and_the_signal_begins_again(light: Control, opened: Opens) -> None:
    one, told = opened(), list[DriftEvent]()
    one.watch.add_listener(told.append)
    fill(one, light.acme.id, range(WINDOW), length=200, text=REFUSED)
    one.watch.acknowledge(light.acme.id, DIGEST, "ft:x", signal="prompt_length", by="key1", note="a new campaign")
    view = one.watch.records.get(light.acme.id, DIGEST, "")
    assert (view.signals["prompt_length"].state, view.signals["prompt_length"].samples) == (
        DriftState.INSUFFICIENT_DATA,
        0,
    )
    given = view.acknowledged["prompt_length"]
    assert (given.by, given.note) == ("key1", "a new campaign") and abs(given.at - time.time()) < 60
    assert view.signals["refusal"].state is DriftState.DRIFT
    (newest,) = one.watch.events.list(light.acme.id, digest=None, after=None, limit=1).items
    assert newest.is_acknowledgement and newest.statistic is not None and newest.statistic > 50.0
    wait_until(lambda: told[-1].is_acknowledgement)
    fill(one, light.acme.id, range(100, 100 + WINDOW))
    assert state_of(one, light.acme.id, "prompt_length") is DriftState.OK
    one.watch.stop()
    two = opened()
    fill(two, light.acme.id, range(200, 201))
    assert two.watch.records.get(light.acme.id, DIGEST, "").acknowledged["prompt_length"] == given


def test_all_signals_in_drift_are_acknowledged_at_once_and_then_there_are_none(light: Control, opened: Opens) -> None:
    one = opened()
    fill(one, light.acme.id, range(WINDOW), length=200, text=REFUSED)
    one.watch.acknowledge(light.acme.id, DIGEST, "ft:x", signal=None, by="key1", note=None)
    view = one.watch.records.get(light.acme.id, DIGEST, "")
    assert set(view.acknowledged) == {"prompt_length", "refusal"}
    for signal in (None, "refusal"):
        with pytest.raises(ConflictError, match="nothing to acknowledge"):
            one.watch.acknowledge(light.acme.id, DIGEST, "ft:x", signal=signal, by="key1", note=None)
    with pytest.raises(NotFoundError):
        one.watch.acknowledge(light.acme.id, "f" * 64, "ft:y", signal=None, by="key1", note=None)


def test_deleting_a_model_takes_its_drift_along_unless_another_id_has_the_same_content(
    light: Control, opened: Opens
) -> None:
    first = light.registry.versions(light.acme.id)[0].id
    second = light.publish(light.acme, digest=DIGEST, suffix="again")
    one = opened()
    for tenant in (light.acme, light.zenith):
        fill(one, tenant.id, range(WINDOW))
    for model, left in ((first, 2), (second, 1)):
        light.registry.delete_model(light.acme.id, model)
        one.watch.forget_deleted(light.acme.id)
        assert rows(light.database, drift_streams) == left == len(one.watch.board.worst(str))
    fill(one, light.acme.id, range(50, 50 + WINDOW))
    assert rows(light.database, drift_streams) == 1, "an answer that came late opens nothing again"
    assert one.watch.events.list(light.acme.id, digest=None, after=None, limit=9).items == ()
    assert one.watch.events.list(light.zenith.id, digest=None, after=None, limit=9).items != ()


def test_what_breaks_is_counted_and_the_next_answer_fares_better(light: Control, opened: Opens) -> None:
    one, told = opened(), list[DriftEvent]()

    def breaks(event: DriftEvent) -> None:
        raise RuntimeError("a listener that breaks")

    one.watch.add_listener(breaks)
    one.watch.add_listener(told.append)
    one.monitors.failing = True
    fill(one, light.acme.id, range(2))
    wait_until(lambda: one.observer.failures == 2)
    one.monitors.failing = False
    fill(one, light.acme.id, range(100, 100 + WINDOW))
    wait_until(lambda: len(told) == 2 and one.observer.failures == 4)


def test_a_database_that_cannot_be_written_is_waited_for_and_no_event_is_lost(
    light: Control, opened: Opens, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, told, save = opened(), list[DriftEvent](), DriftStreams.save
    one.watch.add_listener(told.append)
    fill(one, light.acme.id, range(WINDOW - 1), length=200)

    def locked(self: DriftStreams, streams: object) -> None:
        raise sa.exc.OperationalError("UPDATE", {}, Exception("database is locked"))

    monkeypatch.setattr(DriftStreams, "save", locked)
    fill(one, light.acme.id, range(100, 101), length=200)
    wait_until(lambda: one.observer.failures > 2)
    assert told == []
    monkeypatch.setattr(DriftStreams, "save", save)
    wait_until(lambda: {event.signal for event in told} == {"refusal", "prompt_length"})


def test_a_flood_is_dropped_and_counted_and_never_waited_for(light: Control, opened: Opens) -> None:
    one = opened(start=False)
    start = time.perf_counter()
    for number in range(1000):
        one.answer(light.acme.id, number)
    assert time.perf_counter() - start < 1.0
    assert one.observer.ended == {"dropped": 1000 - MAX_WAITING_OF_A_STREAM}
    one.answer(light.zenith.id, 1)
    assert one.observer.ended.total() == 1000 - MAX_WAITING_OF_A_STREAM, "another's flood is not theirs"


@pytest.mark.slow
def test_while_others_are_served_prompts_wait_and_answers_are_watched(light: Control, opened: Opens) -> None:
    engine = ProbedEngine(num_running=5, on_probe=lambda request: time.sleep(0.05))
    one = opened(engine=engine)
    for number in range(MAX_PROBES_OF_A_STREAM + 16):
        one.answer(light.acme.id, number, text=REFUSED)
        time.sleep(0.002)
    wait_until(lambda: state_of(one, light.acme.id, "refusal") is DriftState.DRIFT)
    wait_until(lambda: one.observer.ended["dropped"] > 0)
    assert len(engine.probes) <= 1
    engine.num_running, engine.on_probe = 0, lambda request: None
    one.settle()
    assert one.observer.ended["measured"] >= MAX_PROBES_OF_A_STREAM


def test_a_probe_that_fails_is_counted_and_says_nothing(light: Control, opened: Opens) -> None:
    one = opened(engine=ProbedEngine(fails=True))
    fill(one, light.acme.id, range(WINDOW))
    assert one.observer.ended == {"failed": WINDOW}
    assert state_of(one, light.acme.id, "prompt_length") is DriftState.INSUFFICIENT_DATA


def test_duplicates_and_busy_users_are_counted_and_not_looked_at(light: Control, opened: Opens) -> None:
    one = opened()
    for number in (1, 1, *range(2, 20)):
        one.answer(light.acme.id, number, user="user:ann")
        one.settle()
    assert one.observer.ended == {"measured": 8, "duplicate": 1, "capped": 11}
    assert len(one.monitors.seen) == 8


def test_the_base_and_later_turns_are_not_watched(opened: Opens) -> None:
    watch, tuned = opened().watch, ResolvedModel("ft:x", DIGEST)
    assert watch.tap("acme", ResolvedModel("tiny", None), Turn(), (1,)) is None
    assert watch.tap("acme", tuned, None, (1,)) is None
    assert watch.tap("acme", tuned, Turn(), (1,)) is not None


def test_an_adapter_made_for_json_has_its_answers_judged_as_such(light: Control, opened: Opens) -> None:
    job = light.create_job(light.acme, suffix="forms")
    metrics = {"evaluation": {"task": "json"}}
    claim = light.claim()
    assert claim.job.id == job.id
    light.queue.succeed(
        claim, digest="e" * 64, base_fingerprint="fingerprint-of-tiny", metrics=metrics, trained_tokens=1
    )
    one = opened()
    one.answer(light.acme.id, 1, digest="e" * 64, text="{}")
    one.answer(light.acme.id, 1, digest=DIGEST, text="{}")
    one.settle()
    assert sorted(str(values["valid_json"]) for values in one.monitors.seen) == ["1.0", "None"]


def test_the_promise_of_false_alarms_counts_what_could_have_alarmed(light: Control, opened: Opens) -> None:
    one = opened(monitors=FakeMonitors(references={DIGEST: FakeReference(run_length=1000.0)}, run_length=2000.0))
    fill(one, light.acme.id, range(WINDOW))
    assert one.observer.expected == 0.0, "nothing is known yet, so nothing can alarm"
    fill(one, light.acme.id, range(100, 110))
    assert one.observer.expected == pytest.approx(10 / 1000 + 10 / 2000)
    fill(one, light.acme.id, range(200, 203), length=200)
    assert one.observer.alarms == {"prompt_length": 1}
    before = one.observer.expected
    fill(one, light.acme.id, range(300, 310), length=200)
    assert one.observer.expected == pytest.approx(before + 10 / 2000), "what has alarmed cannot alarm again"


def test_a_calibration_is_made_elsewhere_once_and_a_failed_one_not_again(light: Control, opened: Opens) -> None:
    one = opened(monitors=FakeMonitors(calibrates=True))
    for tenant in (light.acme, light.zenith):
        fill(one, tenant.id, range(WINDOW + 2))
    assert one.calibrator.started == [(light.acme.id, DIGEST)], "one at a time"
    one.calibrator.finish()
    wait_until(lambda: len(one.calibrator.started) == 2)
    one.calibrator.finish(fails=True)
    wait_until(lambda: one.observer.failures == 1)
    for tenant in (light.acme, light.zenith):
        fill(one, tenant.id, range(100, 103))
    assert len(one.calibrator.started) == 2
    one.watch.stop()
    assert one.calibrator.stopped


def test_no_text_of_prompts_answers_or_users_is_kept(light: Control, opened: Opens) -> None:
    one = opened()
    fill(one, light.acme.id, range(WINDOW), text="a very private answer", user="user:ann")
    one.watch.stop()
    raw = light.url.removeprefix("sqlite:///")
    found = b"".join(path.read_bytes() for path in (Path(raw + end) for end in ("", "-wal")))
    assert b"private" not in found and b"user:ann" not in found and b"drift_streams" in found
