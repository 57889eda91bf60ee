"""How readings move a signal between its states."""

from __future__ import annotations

from dataclasses import replace

from adapters.drift.reading import Reading
from service.drift_states import CALM_RATIO, CALM_SAMPLES, DriftState, SignalState

KNOWN = SignalState("refusal", DriftState.OK, 1.0, 10.0, 50, since=5.0)


def reading(statistic: float | None, *, alarm: bool = False) -> Reading:
    return Reading("refusal", statistic, None if statistic is None else 10.0, 60, alarm)


def test_a_signal_is_unknown_until_a_reading_has_a_statistic() -> None:
    unknown = SignalState("refusal").read(reading(None), 1.0)
    assert (unknown.state, unknown.ratio) == (DriftState.INSUFFICIENT_DATA, None)
    known = unknown.read(reading(5.0), 2.0)
    assert (known.state, known.ratio, known.since) == (DriftState.OK, 0.5, 2.0)


def test_an_alarm_is_believed_at_once() -> None:
    alarmed = KNOWN.read(reading(10.0, alarm=True), 9.0)
    assert (alarmed.state, alarmed.since, alarmed.samples) == (DriftState.DRIFT, 9.0, 60)


def test_drift_outlasts_readings_that_are_only_just_below_the_threshold() -> None:
    state = KNOWN.read(reading(10.0, alarm=True), 9.0)
    for _ in range(3 * CALM_SAMPLES):
        state = state.read(reading(10 * CALM_RATIO), 10.0)
    assert state.state is DriftState.DRIFT


def test_drift_ends_by_itself_after_a_window_of_calm_without_a_break() -> None:
    state = KNOWN.read(reading(10.0, alarm=True), 9.0)
    calm = reading(10 * CALM_RATIO - 0.1)
    for _ in range(CALM_SAMPLES - 1):
        state = state.read(calm, 10.0)
    interrupted = state.read(reading(9.0), 10.0)
    assert (state.state, interrupted.num_calm) == (DriftState.DRIFT, 0)
    assert state.read(calm, 11.0).state is DriftState.OK
    assert interrupted.read(calm, 11.0).state is DriftState.DRIFT


def test_an_alarm_during_the_calm_begins_the_wait_again() -> None:
    state = replace(KNOWN, state=DriftState.DRIFT, num_calm=CALM_SAMPLES - 1)
    assert state.read(reading(12.0, alarm=True), 10.0).num_calm == 0


def test_a_negative_statistic_is_a_known_ratio() -> None:
    assert KNOWN.read(reading(-2.0), 1.0).ratio == -0.2


def test_beginning_again_forgets_the_numbers_and_an_outdated_reference_shows_none() -> None:
    drifting = KNOWN.read(reading(10.0, alarm=True), 9.0)
    again, stale = drifting.begin_again(12.0), drifting.outdate(13.0)
    assert (again.state, again.statistic, again.samples, again.since) == (DriftState.INSUFFICIENT_DATA, None, 0, 12.0)
    assert (stale.state, stale.statistic, stale.ratio, stale.since) == (DriftState.STALE_REFERENCE, None, None, 13.0)


def test_a_state_that_stays_keeps_the_time_since_which_it_holds() -> None:
    assert KNOWN.read(reading(2.0), 99.0).since == KNOWN.since


def test_drift_matters_most_and_not_knowing_least() -> None:
    order = sorted(DriftState, key=lambda state: state.severity)
    assert (order[0], order[-1]) == (DriftState.INSUFFICIENT_DATA, DriftState.DRIFT)
