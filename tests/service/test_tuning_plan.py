"""What a job's hyperparameters become."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from adapters.errors import TrainingError
from adapters.lora_weights import BaseSignature, LinearShape, LoraSpec
from adapters.rate_probe import ProbeResult
from service.job import Hyperparameters, JobSpec, Method, Preset
from service.tuning_plan import TuningPlan, make_plan

SMALL = BaseSignature({"model.layers.0.up_proj": LinearShape(1000, 7000)}, fingerprint="f")
WITH_ATTENTION = BaseSignature(
    {
        "model.layers.0.self_attn.q_proj": LinearShape(1000, 1000),
        "model.layers.0.self_attn.k_proj": LinearShape(1000, 1000),
        "model.layers.0.mlp.up_proj": LinearShape(1000, 7000),
    },
    fingerprint="f",
)
LARGE = BaseSignature({"model.layers.0.up_proj": LinearShape(100_000, 80_000)}, fingerprint="f")


def _plan(
    asked: Hyperparameters | None = None,
    *,
    base: BaseSignature = SMALL,
    parent: LoraSpec | None = None,
    max_rank: int = 64,
    **spec: Any,
) -> TuningPlan:
    job = JobSpec("m", "m", "file", seed=5, hyperparameters=asked or Hyperparameters(), **spec)
    return make_plan(job, num_examples=1000, num_valid=10, base=base, max_rank=max_rank, parent=parent)


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
    assert [name for name, value in resolved.items() if value == "auto"] == ["activation_checkpointing"]
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
        Hyperparameters(layers_to_transform=(0,)),
    ],
)
def test_another_shape_than_the_continued_adapters_is_refused(asked: Hyperparameters) -> None:
    with pytest.raises(TrainingError, match="leave these out, or start from the base") as caught:
        _plan(asked, parent=LoraSpec(r=4, lora_alpha=5, target_modules=("up_proj",)))
    assert caught.value.code == "invalid_hyperparameters"


def test_presets_spend_more_and_more() -> None:
    light, standard, thorough = (_plan(base=WITH_ATTENTION, preset=preset) for preset in Preset)
    assert [plan.spec.r for plan in (light, standard, thorough)] == [8, 16, 32]
    assert [plan.config.num_epochs for plan in (light, standard, thorough)] == [4, 8, 12]
    assert [plan.config.patience for plan in (light, standard, thorough)] == [3, 8, 12]
    assert light.config.eval_every > standard.config.eval_every > thorough.config.eval_every
    assert (light.spec.target_modules, standard.spec.target_modules) == (("k_proj", "q_proj"), "all-linear")
    assert [plan.probes for plan in (light, standard, thorough)] == [False, False, True]
    assert (thorough.config.schedule, thorough.config.weight_decay, thorough.spec.lora_dropout) == (
        "cosine",
        0.01,
        0.05,
    )
    assert _plan(base=WITH_ATTENTION) == standard


def test_what_a_job_names_itself_wins_over_its_preset() -> None:
    asked = Hyperparameters(
        lora_r=4, n_epochs=2, learning_rate=1e-3, schedule="linear", weight_decay=0.5, target_modules=("up_proj",)
    )
    plan = _plan(asked, preset=Preset.THOROUGH)
    assert (plan.spec.r, plan.spec.target_modules, plan.config.num_epochs) == (4, ("up_proj",), 2)
    assert (plan.config.learning_rate, plan.probes) == (1e-3, False)
    assert (plan.config.schedule, plan.config.weight_decay) == ("linear", 0.5)


def test_a_preset_asks_for_no_higher_rank_than_the_service_allows() -> None:
    assert _plan(preset=Preset.THOROUGH, max_rank=16).spec.r == 16


def test_a_base_without_attention_of_its_own_names_gets_all_layers_from_every_preset() -> None:
    assert _plan(preset=Preset.LIGHT).spec.target_modules == "all-linear"


def test_a_probe_is_made_when_asked_for_and_its_choice_is_shown() -> None:
    assert not _plan(Hyperparameters(learning_rate="auto")).probes
    assert not _plan(Hyperparameters(learning_rate_multiplier=2.0), preset=Preset.THOROUGH).probes
    plan = _plan(Hyperparameters(learning_rate="probe", learning_rate_multiplier=2.0))
    assert plan.probes and plan.config.learning_rate == pytest.approx(4e-3)
    assert plan.resolved["learning_rate"] == "probe"
    probed = plan.probed(ProbeResult((1e-3, 4e-3, 1e-2), (2.0, 1.0, None), 12, 4e-3))
    assert (probed.config.learning_rate, probed.resolved["learning_rate"]) == (4e-3, 4e-3)
    assert probed.resolved["learning_rate_probe"] == {
        "learning_rates": [1e-3, 4e-3, 1e-2],
        "valid_losses": [2.0, 1.0, None],
        "steps": 12,
    }


def test_preferences_are_learned_more_gently() -> None:
    plan, supervised = _plan(method=Method.DPO), _plan()
    assert plan.config.beta == 0.1
    assert supervised.config.beta is None
    assert plan.config.learning_rate == pytest.approx(supervised.config.learning_rate / 4)
    assert plan.config.num_epochs == supervised.config.num_epochs / 2
    assert _plan(Hyperparameters(beta=0.5), method=Method.DPO).config.beta == 0.5


def test_a_continued_adapter_keeps_its_layers() -> None:
    parent = LoraSpec(r=4, target_modules=("up_proj",), layers_to_transform=(0, 2))
    assert _plan(parent=parent).spec == parent
    assert _plan(Hyperparameters(layers_to_transform=(0, 2)), parent=parent, preset=Preset.LIGHT).spec == parent


def test_a_job_reads_back_from_its_row_as_it_was() -> None:
    asked = Hyperparameters(target_modules=("up_proj",), layers_to_transform=(1, 2), learning_rate="probe")
    spec = JobSpec("m", "m", "f", 1, method=Method.DPO, preset=Preset.LIGHT, hyperparameters=asked)
    assert JobSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec
