"""A merged model is plain: transformers loads it alone, and it answers as base and adapter do together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from adapters.lora import routing
from adapters.lora_weights import LoraSpec, LoraWeights
from adapters.trainable import TrainableLora, TrainRouting
from service.config import BUNDLED_BASE
from service.engine.base_model import BaseModel, load_base_model
from service.merging import write_merged
from tests.adapters.loras import random_lora

IDS = torch.arange(10, 42)[None]
EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@pytest.fixture(scope="module")
def dense(tiny_llama_dir: Path) -> BaseModel:
    return load_base_model(str(tiny_llama_dir), quantization="none", device="cpu", name="tiny")


def _together(base: BaseModel, weights: LoraWeights) -> torch.Tensor:
    """Logits of the base with the adapter beside it, unmerged."""
    adapter = TrainableLora(weights.spec, base.signature, seed=0, device=base.device)
    adapter.load(weights.modules)
    with torch.no_grad(), routing(TrainRouting(adapter, training=False)):
        logits: torch.Tensor = base.model(input_ids=IDS, use_cache=False).logits
    return logits.float()


def _alone(directory: Path) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(directory, use_safetensors=True)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits.float()


@pytest.mark.parametrize("targets", ["all-linear", EVERYWHERE])
def test_on_an_unquantized_base_merged_and_unmerged_agree(dense: BaseModel, targets: object, tmp_path: Path) -> None:
    before = dense.parameter_hash()
    weights = random_lora(dense.signature, seed=2, spec=LoraSpec(r=4, target_modules=targets), size=0.05)  # type: ignore[arg-type]
    report = write_merged(dense, weights, tmp_path, model="ft:x", digest="d" * 64)
    torch.testing.assert_close(_alone(tmp_path), _together(dense, weights), atol=1e-4, rtol=1e-4)
    assert report.update_error == pytest.approx(0, abs=1e-6)
    assert dense.parameter_hash() == before
    assert AutoTokenizer.from_pretrained(tmp_path).encode("Hello") == dense.tokenizer.encode("Hello")
    assert "ft:x" in (tmp_path / "README.md").read_text()


def test_a_large_model_is_written_in_parts_that_load_as_one(dense: BaseModel, tmp_path: Path) -> None:
    weights = random_lora(dense.signature, seed=2)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    write_merged(dense, weights, tmp_path / "whole", model="m", digest="d" * 64)
    write_merged(dense, weights, tmp_path / "parts", model="m", digest="d" * 64, max_shard_bytes=300_000)
    parts = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(parts) > 2 and all(path.stat().st_size < 310_000 for path in parts)
    assert torch.equal(_alone(tmp_path / "whole"), _alone(tmp_path / "parts"))


def test_a_4_bit_base_answers_differently_once_merged_and_the_report_says_how_much(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Merging rounds base + update to bfloat16: the update loses bits next to larger weights."""
    base = load_base_model(str(tiny_llama_dir), quantization="nf4", device="cpu", name="tiny")
    weights = random_lora(base.signature, seed=2, size=0.05)
    report = write_merged(base, weights, tmp_path, model="m", digest="d" * 64)
    difference = (_alone(tmp_path) - _together(base, weights)).abs().max().item()
    without = _together(base, random_lora(base.signature, seed=2, size=0))
    effect = (_together(base, weights) - without).abs().max().item()
    assert 0 < difference < effect / 5
    assert (report.dtype, report.quantization) == ("bfloat16", "nf4")
    assert 0 < report.update_error < 0.2


@pytest.mark.slow
def test_tied_embeddings_stay_tied_unless_the_head_has_learned(tmp_path: Path) -> None:
    base = load_base_model(str(BUNDLED_BASE), quantization="none", device="cpu", dtype=torch.float32)
    for name, targets, tied in (("body", "all-linear", True), ("head", ("lm_head", "q_proj"), False)):
        (tmp_path / name).mkdir()
        spec = LoraSpec(r=2, target_modules=targets)  # type: ignore[arg-type]
        weights = random_lora(base.signature, seed=3, spec=spec, size=0.02)
        write_merged(base, weights, tmp_path / name, model="m", digest="d" * 64)
        assert AutoConfig.from_pretrained(tmp_path / name).tie_word_embeddings is tied
        torch.testing.assert_close(_alone(tmp_path / name), _together(base, weights), atol=1e-3, rtol=1e-3)
