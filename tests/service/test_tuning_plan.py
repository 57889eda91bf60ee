"""What a job's hyperparameters become."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.errors import TrainingError
from adapters.peft_format import BaseSignature, LinearShape, LoraSpec
from service.job import Hyperparameters
from service.tuning_plan import TuningPlan, make_plan

SMALL = BaseSignature({"model.layers.0.up_proj": LinearShape(1000, 7000)}, fingerprint="f")
LARGE = BaseSignature({"model.layers.0.up_proj": LinearShape(100_000, 80_000)}, fingerprint="f")


def _plan(
    asked: Hyperparameters | None = None, *, base: BaseSignature = SMALL, parent: LoraSpec | None = None
) -> TuningPlan:
    return make_plan(asked or Hyperparameters(), seed=5, num_examples=1000, num_valid=10, base=base, parent=parent)


def test_the_defaults_are_those_practitioners_agree_on() -> None:
    plan = _plan(base=LARGE)
    assert plan.spec == LoraSpec(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)
    assert plan.config.learning_rate == pytest.approx(2e-4)
    assert (plan.config.batch_size, plan.config.num_epochs, plan.config.seed) == (16, 3, 5)


def test_a_small_base_gets_a_higher_learning_rate_and_more_epochs() -> None:
    config = _plan().config
    assert config.learning_rate == pytest.approx(2e-3)
    assert config.num_epochs == 8


def test_a_multiplier_scales_the_learning_rate_that_auto_would_choose() -> None:
    plan = _plan(Hyperparameters(learning_rate_multiplier=0.5))
    assert plan.config.learning_rate == pytest.approx(1e-3)
    assert plan.resolved["learning_rate_multiplier"] == pytest.approx(0.5)


def test_a_learning_rate_is_taken_as_it_is_and_shown_as_a_multiplier_too() -> None:
    plan = _plan(Hyperparameters(learning_rate=3e-3))
    assert plan.config.learning_rate == 3e-3
    assert plan.resolved["learning_rate_multiplier"] == pytest.approx(1.5)


def test_alpha_follows_the_rank_unless_it_is_given() -> None:
    assert _plan(Hyperparameters(lora_r=4)).spec.lora_alpha == 8
    assert _plan(Hyperparameters(lora_r=4, lora_alpha=4.0)).spec.lora_alpha == 4


def test_nothing_stays_auto_in_what_a_client_sees() -> None:
    asked = Hyperparameters(n_epochs=2, early_stopping_patience=None, target_modules=("up_proj",))
    resolved = _plan(asked).resolved
    assert set(resolved) == set(asked.as_dict())
    assert "auto" not in resolved.values()
    assert resolved["n_epochs"] == 2
    assert resolved["early_stopping_patience"] is None
    assert resolved["target_modules"] == ["up_proj"]


def test_a_continued_adapter_keeps_its_shape() -> None:
    parent = LoraSpec(r=4, lora_alpha=5, target_modules=("up_proj",), use_rslora=True)
    assert _plan(parent=parent).spec == parent
    assert _plan(Hyperparameters(lora_r=4), parent=parent).spec == parent
    assert _plan(Hyperparameters(lora_dropout=0.1), parent=parent).spec == replace(parent, lora_dropout=0.1)


@pytest.mark.parametrize(
    "asked",
    [
        Hyperparameters(lora_r=8),
        Hyperparameters(lora_alpha=9.0),
        Hyperparameters(target_modules=("down_proj",)),
        Hyperparameters(use_rslora=True),
    ],
)
def test_another_shape_than_the_continued_adapters_is_refused(asked: Hyperparameters) -> None:
    with pytest.raises(TrainingError, match="leave these out, or start from the base") as caught:
        _plan(asked, parent=LoraSpec(r=4, lora_alpha=5, target_modules=("up_proj",)))
    assert caught.value.code == "invalid_hyperparameters"
