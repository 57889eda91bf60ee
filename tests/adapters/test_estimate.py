"""The arithmetic of an estimate against a slow count of the same, and a calibration that leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters.calibration import calibrate
from adapters.estimate import Pace, RunSize, estimate, peak_memory_bytes
from adapters.lora_weights import LoraSpec
from adapters.trainable import TrainRouting
from adapters.trainer import Trainer
from tests.adapters.conftest import GraftedBase, TemplateCodec
from tests.adapters.corpora import CONFIG, SPEC, bits, chats, make_trainer, pairs, run


def _trainer(base: GraftedBase, codec: TemplateCodec, spec: LoraSpec = SPEC, **config: Any) -> Trainer:
    corpus = pairs if config.get("beta") else chats
    return make_trainer(base, corpus(codec), corpus(codec, 6, seed=1), replace(CONFIG, **config), spec)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [{}, {"eval_every": 5}, {"eval_every": 7, "num_epochs": 2}, {"batch_size": 3, "max_steps": 11}, {"beta": 0.1}],
    ids=str,
)
def test_tokens_steps_and_evaluations_are_those_of_the_run(
    grafted: GraftedBase, codec: TemplateCodec, config: dict[str, Any]
) -> None:
    trainer = _trainer(grafted, codec, **config)
    size = RunSize.of(trainer.config, trainer.train, trainer.valid)
    run(trainer, trainer.num_steps)
    assert (size.tokens, size.steps, size.evaluations) == (
        trainer.trained_tokens,
        trainer.steps_done,
        len(trainer.scores),
    )


@pytest.mark.parametrize("config", [{}, {"beta": 0.1}, {"max_slice_tokens": 48}], ids=str)
def test_packs_are_those_that_the_trainer_makes(
    grafted: GraftedBase, codec: TemplateCodec, config: dict[str, Any]
) -> None:
    trainer = _trainer(grafted, codec, **config)
    made = {
        trainer.objective.num_tokens(pack)
        for step in range(trainer.steps_per_epoch)
        for pack in trainer.objective.packs(trainer.cursor.batch(step))
    }
    size = RunSize.of(trainer.config, trainer.train, trainer.valid)
    assert {pack.num_tokens for pack in size.packs} == made


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"beta": 0.1}, {"recompute_layers": True}], ids=str)
def test_a_calibrated_run_ends_with_the_same_bits(
    grafted: GraftedBase, codec: TemplateCodec, config: dict[str, Any]
) -> None:
    spec = replace(SPEC, lora_dropout=0.2)
    straight = _trainer(grafted, codec, spec, **config)
    calibrated = _trainer(grafted, codec, spec, **config)
    before = torch.get_rng_state()
    pace = calibrate(calibrated)
    assert torch.equal(torch.get_rng_state(), before)
    assert min(pace.per_token, pace.per_update, pace.per_scored_token) > 0
    assert (calibrated.steps_done, calibrated.scores) == (0, {})
    run(straight, 4)
    run(calibrated, 4)
    assert bits(calibrated) == bits(straight)
    assert calibrated.history == straight.history


def test_a_calibration_is_a_small_part_of_the_run(grafted: GraftedBase, codec: TemplateCodec) -> None:
    trainer = _trainer(grafted, codec, num_epochs=40)
    num_packs = 0

    def count() -> None:
        nonlocal num_packs
        num_packs += 1

    calibrate(trainer, count)
    whole = sum(len(trainer.objective.packs(trainer.cursor.batch(step))) for step in range(trainer.num_steps))
    assert 0 < num_packs < 0.1 * whole


def test_seconds_follow_the_measured_pace_and_else_the_remembered_one(
    grafted: GraftedBase, codec: TemplateCodec
) -> None:
    trainer = _trainer(grafted, codec)
    size = RunSize.of(trainer.config, trainer.train, trainer.valid, probes=True)
    measured = estimate(size, 1, Pace(0.5, 2.0, 0.25))
    trained = 0.5 * size.tokens + 2.0 * size.steps
    assert measured.seconds == pytest.approx(trained + 0.25 * size.evaluations * trainer.valid.num_tokens)
    assert measured.seconds_per_step == pytest.approx(trained / size.steps)
    coarse = estimate(size, 1, tokens_per_second=10.0)
    assert coarse.seconds == pytest.approx(size.tokens * (1 + size.probe_steps / size.steps) / 10)
    assert estimate(size, 1).seconds is None


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("spec", [SPEC, LoraSpec(r=32), LoraSpec(r=4, target_modules=("q_proj", "v_proj"))])
def test_the_activations_in_the_formula_are_those_that_autograd_keeps(
    grafted: GraftedBase, codec: TemplateCodec, spec: LoraSpec, recompute: bool
) -> None:
    """All but what a backward makes on its way: gradients, moments, and two thirds of the logits' part."""
    trainer = _trainer(grafted, codec, spec, recompute_layers=recompute, batch_size=20)
    size = RunSize.of(trainer.config, trainer.train, trainer.valid)
    vocabulary = grafted.signature.modules["lm_head"].out_features
    predicted = peak_memory_bytes(
        size, spec, grafted.signature, vocabulary=vocabulary, activation_bytes=4, recompute=recompute
    )
    largest = max(size.packs, key=lambda pack: pack.num_tokens)
    num_masters = sum(parameter.numel() for parameter in trainer.adapter.parameters())
    weight = max(shape.in_features * shape.out_features for shape in grafted.signature.modules.values())
    kept = predicted - 20 * num_masters - 4 * weight - 8 * largest.num_learned * vocabulary
    batch = trainer.cursor.batch(0)
    pack = max(trainer.objective.packs(batch), key=trainer.objective.num_tokens)
    found: dict[int, int] = {}
    frozen = {t.untyped_storage().data_ptr() for t in (*grafted.model.parameters(), *grafted.model.buffers())}
    masters = {parameter.untyped_storage().data_ptr() for parameter in trainer.adapter.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen | masters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = trainer.objective(pack, trainer.objective.divisors(batch), TrainRouting(trainer.adapter))
    assert result.loss.requires_grad
    if recompute:  # the one layer that is computed again is not kept yet
        assert sum(found.values()) < kept
    else:
        assert 0.75 < kept / sum(found.values()) < 1.25
