"""Three short runs choose the learning rate: the same rate every time, also when interrupted."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters.corpus import Corpus
from adapters.errors import TrainingError
from adapters.rate_probe import RateProbe
from adapters.recipe import TrainConfig, auto_probe_steps
from adapters.trainer import Trainer
from tests.adapters.conftest import GraftedBase, TemplateCodec
from tests.adapters.corpora import CONFIG, bits, chats, make_trainer, pairs

MIDDLE = replace(CONFIG, learning_rate=3e-3, num_epochs=20, batch_size=2)


class _Runs:
    """Makes the probe's trainers and remembers them."""

    def __init__(self, base: GraftedBase, train: Corpus, valid: Corpus) -> None:
        self.made: list[Trainer] = []
        self.starts: list[list[bytes]] = []
        self._base, self._train, self._valid = base, train, valid

    def __call__(self, config: TrainConfig, max_valid: int | None = None) -> Trainer:
        assert max_valid is not None
        trainer = make_trainer(self._base, self._train, self._valid.first(max_valid), config)
        self.made.append(trainer)
        self.starts.append(bits(trainer))
        return trainer


def _probe(
    base: GraftedBase, codec: TemplateCodec, config: TrainConfig = MIDDLE, num_steps: int = 6
) -> tuple[RateProbe, _Runs]:
    corpus = pairs if config.beta is not None else chats
    runs = _Runs(base, corpus(codec), corpus(codec, 4, seed=1))
    return RateProbe(runs, config, num_steps), runs


def _through(probe: RateProbe) -> RateProbe:
    while not probe.done:
        probe.step()
    return probe


def test_the_rate_with_the_lowest_smoothed_validation_loss_wins(grafted: GraftedBase, codec: TemplateCodec) -> None:
    probe, runs = _probe(grafted, codec)
    result = _through(probe).result()
    assert result.rates == pytest.approx((1e-3, 3e-3, 9e-3))
    smoothed = []
    for trainer in runs.made:
        last = [trainer.scores[step].loss for step in sorted(trainer.scores)[-3:]]
        smoothed.append(sum(last) / 3)
    assert result.losses == pytest.approx(smoothed)
    assert result.chosen == result.rates[smoothed.index(min(smoothed))]


def test_all_three_start_from_the_same_weights_on_the_same_batches(grafted: GraftedBase, codec: TemplateCodec) -> None:
    probe, runs = _probe(grafted, codec)
    _through(probe)
    assert runs.starts[0] == runs.starts[1] == runs.starts[2]
    assert [trainer.steps_done for trainer in runs.made] == [6, 6, 6]
    assert len({trainer.history[0].loss for trainer in runs.made}) == 1
    assert len({tuple(trainer.cursor.batch(5)) for trainer in runs.made}) == 1


@pytest.mark.slow
def test_too_low_too_high_and_right_are_told_apart(grafted: GraftedBase, codec: TemplateCodec) -> None:
    too_low, _ = _probe(grafted, codec, replace(MIDDLE, learning_rate=1e-5), 100)
    assert _through(too_low).result().chosen == pytest.approx(3e-5)
    too_high, _ = _probe(grafted, codec, replace(MIDDLE, learning_rate=3.0), 100)
    assert _through(too_high).result().chosen == pytest.approx(1.0)


@pytest.mark.slow
def test_an_interrupted_probe_chooses_the_very_same(grafted: GraftedBase, codec: TemplateCodec) -> None:
    straight = _through(_probe(grafted, codec)[0]).result()
    probe, _ = _probe(grafted, codec)
    for _ in range(9):
        probe.step()
    probe = _resumed(probe, grafted, codec)
    assert _through(probe).result() == straight


@pytest.mark.slow
def test_a_probe_interrupted_in_an_evaluation_makes_up_for_it(grafted: GraftedBase, codec: TemplateCodec) -> None:
    straight = _through(_probe(grafted, codec)[0]).result()
    probe, runs = _probe(grafted, codec)

    def stop_in_evaluation() -> None:
        if runs.made[0].evaluation_due:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        while True:
            probe.step(stop_in_evaluation)
    assert _through(_resumed(probe, grafted, codec)).result() == straight


def test_a_rate_that_explodes_loses_and_three_of_them_end_the_job(grafted: GraftedBase, codec: TemplateCodec) -> None:
    probe, runs = _probe(grafted, codec)
    probe.losses = [float("inf"), 2.0]
    _through(probe)
    result = probe.result()
    assert result.losses[0] is None
    assert len(runs.made) == 1
    probe.losses = [float("inf")] * 3
    with pytest.raises(TrainingError, match="none of the learning rates") as caught:
        probe.result()
    assert caught.value.param == "hyperparameters.learning_rate"


def test_a_non_finite_run_of_the_probe_is_a_loss_and_no_failure(grafted: GraftedBase, codec: TemplateCodec) -> None:
    probe, _ = _probe(grafted, codec, replace(MIDDLE, learning_rate=1e30))
    _through(probe)
    assert probe.losses == [float("inf")] * 3


@pytest.mark.slow
def test_the_reference_of_pairs_is_taken_once_for_all_rates(grafted: GraftedBase, codec: TemplateCodec) -> None:
    probe, runs = _probe(grafted, codec, replace(MIDDLE, beta=0.1))
    _through(probe)
    first, second, third = (trainer.objective.state_dict()["reference"] for trainer in runs.made)
    assert first is not None and torch.equal(first, second) and torch.equal(first, third)
    assert torch.equal(probe.prepared["reference"], first)


def test_a_probe_takes_a_tenth_of_a_run_within_bounds() -> None:
    assert [auto_probe_steps(count) for count in (4, 50, 200, 10_000)] == [4, 10, 20, 40]


def _resumed(probe: RateProbe, base: GraftedBase, codec: TemplateCodec) -> RateProbe:
    buffer = io.BytesIO()
    torch.save(probe.state_dict(), buffer)
    buffer.seek(0)
    state: dict[str, Any] = torch.load(buffer, weights_only=True)
    again, _ = _probe(base, codec)
    again.load_state_dict(state)
    return again
