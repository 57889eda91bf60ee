"""PEFT directories: what plain PEFT writes is read, what is written here plain PEFT loads, the rest is refused."""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from adapters.errors import AdapterFormatError, BaseMismatchError
from adapters.lora_weights import BaseSignature, LinearShape, LoraSpec, TensorIdentity
from adapters.peft_format import read_adapter, write_adapter
from tests.adapters.loras import random_lora


@pytest.fixture(scope="module")
def signature(tiny_llama_dir: Path) -> BaseSignature:
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    modules = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    embeddings = {
        "lm_head.weight": TensorIdentity.of(model.lm_head.weight),
        "model.embed_tokens.weight": TensorIdentity.of(model.model.embed_tokens.weight),
    }
    return BaseSignature(
        {n: LinearShape(*s) for n, s in modules.items()}, "fingerprint", frozenset({"tiny"}), "lm_head", embeddings
    )


@pytest.fixture
def adapter_dir(tmp_path: Path, signature: BaseSignature) -> Path:
    write_adapter(tmp_path / "a", random_lora(signature, seed=1), base_name="tiny", base=signature)
    return tmp_path / "a"


SPECS = [
    LoraSpec(r=4, lora_alpha=4),
    LoraSpec(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")),
    LoraSpec(r=8, lora_alpha=16, use_rslora=True, target_modules=("down_proj", "o_proj")),
    LoraSpec(r=4, lora_alpha=8, rank_pattern={"q_proj": 12}, alpha_pattern={"q_proj": 30.0}),
    LoraSpec(r=8, target_modules=("lm_head", "gate_proj")),
    LoraSpec(r=8, layers_to_transform=(1,)),
]


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_written_here_plain_peft_loads_with_the_same_effect(
    spec: LoraSpec, tmp_path: Path, signature: BaseSignature, tiny_llama_dir: Path
) -> None:
    weights = random_lora(signature, seed=3, spec=spec)
    write_adapter(tmp_path, weights, base_name=str(tiny_llama_dir), base=signature)
    ids = torch.arange(10, 30)[None]
    merged = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        for name, pair in weights.modules.items():
            merged.get_parameter(f"{name}.weight").add_(pair.b @ pair.a * pair.scaling)
        theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama_dir), str(tmp_path))
        torch.testing.assert_close(theirs(input_ids=ids).logits, merged(input_ids=ids).logits, atol=2e-4, rtol=2e-4)
    again = read_adapter(tmp_path, replace(signature, names=frozenset()), max_rank=64)
    assert set(again.modules) == set(weights.modules)
    for name, pair in weights.modules.items():
        assert torch.equal(pair.a, again.modules[name].a)
        assert pair.scaling == pytest.approx(again.modules[name].scaling)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear", ["lm_head", "q_proj"]])
def test_what_plain_peft_saves_is_read_unchanged(
    targets: Any, tmp_path: Path, signature: BaseSignature, tiny_llama_dir: Path
) -> None:
    config = LoraConfig(r=6, lora_alpha=9, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    theirs: Any = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_llama_dir), config)
    theirs.save_pretrained(str(tmp_path))
    base = replace(signature, names=frozenset({tiny_llama_dir.name}))
    weights = read_adapter(tmp_path, base, max_rank=64)
    saved = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert set(weights.modules) == set(saved)
    for name, module in saved.items():
        assert torch.equal(weights.modules[name].a, module.lora_A["default"].weight)
        assert torch.equal(weights.modules[name].b, module.lora_B["default"].weight)
        assert weights.modules[name].scaling == module.scaling["default"]


def _config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "adapter_config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return apply


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return apply


def _pickled(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps({}))


def _lying_header(raw: bytes) -> bytes:
    """Say that the first tensor is far larger than the file."""
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    name = next(n for n in header if n != "__metadata__")
    header[name]["data_offsets"] = [0, 1 << 40]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[FIRST]


def fill(tensors: dict[str, torch.Tensor], value: str) -> None:
    tensors[FIRST].fill_(float(value))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
OTHER = {"base_model_name_or_path": "some/other-base"}
REFUSED: list[tuple[str, Callable[[Path], object]]] = [
    ("files", lambda d: (d / "adapter_config.json").unlink()),
    ("files", lambda d: (d / "adapter_model.safetensors").unlink()),
    ("pickle", _pickled),
    ("config", lambda d: (d / "adapter_config.json").write_text("{")),
    ("config", lambda d: (d / "adapter_config.json").write_text("[]")),
    ("config", _config(lambda c: c.update(peft_type="IA3"))),
    ("config", _config(lambda c: c.update(r="8"))),
    ("config", _config(lambda c: c.update(target_modules=None))),
    ("config", _config(lambda c: c.update(lora_alpha=float("nan")))),
    ("rank", _config(lambda c: c.update(r=100_000))),
    ("rank", _config(lambda c: c.update(r=0))),
    ("rank", _config(lambda c: c.update(rank_pattern={"q_proj": 4096}))),
    ("unsupported", _config(lambda c: c.update(use_dora=True))),
    ("unsupported", _config(lambda c: c.update(modules_to_save=["lm_head"]))),
    ("unsupported", _config(lambda c: c.update(bias="all"))),
    ("base", _config(lambda c: c.update(OTHER))),
    ("match", _config(lambda c: c.update(target_modules=["wq"]))),
    ("match", _config(lambda c: c.update(target_modules=["q_proj"]))),
    ("match", _config(lambda c: c["target_modules"].append("lm_head"))),
    ("match", _tensors(drop)),
    ("match", _tensors(lambda t: t.update({FIRST.replace("layers.0", "layers.7"): t[FIRST].clone()}))),
    ("match", _tensors(lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(128)}))),
    ("shape", _tensors(lambda t: t.update({FIRST: torch.zeros(8, 64)}))),
    ("dtype", _tensors(lambda t: t.update({FIRST: torch.zeros(8, 128, dtype=torch.int8)}))),
    ("finite", _tensors(lambda t: fill(t, "nan"))),
    ("finite", _tensors(lambda t: fill(t, "inf"))),
    ("safetensors", _bytes(lambda raw: raw[: len(raw) // 2])),
    ("safetensors", _bytes(lambda raw: struct.pack("<Q", 1 << 60) + raw[8:])),
    ("safetensors", _bytes(_lying_header)),
    ("safetensors", _bytes(lambda raw: b"")),
]


@pytest.mark.parametrize(("check", "break_it"), REFUSED)
def test_a_broken_directory_is_refused_and_the_check_is_named(
    check: str, break_it: Callable[[Path], object], adapter_dir: Path, signature: BaseSignature
) -> None:
    break_it(adapter_dir)
    with pytest.raises(AdapterFormatError) as refusal:
        read_adapter(adapter_dir, signature, max_rank=64)
    assert refusal.value.check == check


def test_an_adapter_of_other_weights_under_the_same_name_is_refused(
    adapter_dir: Path, signature: BaseSignature
) -> None:
    with pytest.raises(BaseMismatchError):
        read_adapter(adapter_dir, replace(signature, fingerprint="retrained"), max_rank=64)


def test_a_target_that_matches_nothing_names_what_there_is(signature: BaseSignature) -> None:
    with pytest.raises(AdapterFormatError, match="q_proj"):
        LoraSpec(target_modules=("q_proj", "query")).matching(signature)


def _rewrite(adapter_dir: Path, **values: object) -> None:
    path = adapter_dir / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_why_a_dora_adapter_is_refused_is_said(adapter_dir: Path, signature: BaseSignature) -> None:
    _rewrite(adapter_dir, use_dora=True)
    with pytest.raises(AdapterFormatError, match=r"use_dora: DoRA rescales .* served wrongly") as caught:
        read_adapter(adapter_dir, signature, max_rank=64)
    assert caught.value.check == "unsupported"


@pytest.mark.parametrize("layers", [1, [1]])
@pytest.mark.parametrize("pattern", [None, "layers", ["layers"], []])
def test_pefts_ways_to_name_layers_are_read(
    tmp_path: Path, signature: BaseSignature, layers: object, pattern: object
) -> None:
    spec = LoraSpec(r=4, target_modules=("q_proj",), layers_to_transform=(1,))
    write_adapter(tmp_path, random_lora(signature, seed=1, spec=spec), base_name="tiny", base=signature)
    _rewrite(tmp_path, layers_to_transform=layers, layers_pattern=pattern)
    assert list(read_adapter(tmp_path, signature, max_rank=64).modules) == ["model.layers.1.self_attn.q_proj"]


def test_a_pattern_that_is_not_the_bases_list_of_layers_is_refused(adapter_dir: Path, signature: BaseSignature) -> None:
    _rewrite(adapter_dir, layers_to_transform=[0, 1], layers_pattern="h")
    with pytest.raises(AdapterFormatError, match="layers_pattern='h' is not the base's list of layers"):
        read_adapter(adapter_dir, signature, max_rank=64)


def test_a_layer_that_the_base_lacks_is_refused_and_named(signature: BaseSignature) -> None:
    with pytest.raises(AdapterFormatError, match=r"names layer 7, which the base lacks \(it has 0 to 1\)") as caught:
        LoraSpec(layers_to_transform=(1, 7)).matching(signature)
    assert caught.value.param == "layers_to_transform"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"some_new_option": True}, "some_new_option"),
        ({"layers_pattern": "blocks"}, "layers_pattern"),
        ({"rank_pattern": {"(q+)+_proj": 4}}, "pattern"),
        ({"velora_config": {"rank": 4}}, "velora_config"),
    ],
)
def test_an_option_that_would_change_what_the_tensors_mean_is_refused_by_name(
    change: dict[str, Any], named: str, adapter_dir: Path, signature: BaseSignature
) -> None:
    _config(lambda c: c.update(change))(adapter_dir)
    with pytest.raises(AdapterFormatError, match=named) as refusal:
        read_adapter(adapter_dir, signature, max_rank=64)
    assert refusal.value.check == "unsupported"


def test_an_option_that_is_off_is_no_reason_to_refuse(adapter_dir: Path, signature: BaseSignature) -> None:
    _config(lambda c: c.update(some_new_option=False, another={}, init_lora_weights="gaussian"))(adapter_dir)
    assert read_adapter(adapter_dir, signature, max_rank=64).max_rank == 8


def test_a_rank_pattern_means_what_peft_means_by_it(signature: BaseSignature) -> None:
    keys = {"^model.layers.1.mlp.down_proj": 3, r"self_attn\.q_proj": 5, "o_proj$": 6, "layers.0.mlp": 7}
    spec = LoraSpec(r=4, rank_pattern=keys)
    for module in signature.modules:
        theirs = next((rank for key, rank in keys.items() if re.match(rf"(.*\.)?({key})$", module)), 4)
        assert spec.rank_of(module) == theirs
    assert {spec.rank_of(module) for module in signature.modules} == {3, 4, 5, 6}
