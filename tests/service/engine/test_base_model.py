"""The base: any family found generically, one copy that serves and trains, and clear refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapters.lora import routing
from adapters.lora_weights import LoraSpec
from adapters.trainable import TrainableLora, TrainRouting
from service.engine.base_model import DEFAULT_CHAT_TEMPLATE, BaseModel, load_base_model
from service.engine.errors import BaseModelError, ChatTemplateError
from service.engine.frozen_linear import FrozenLinear, decoding
from service.engine.quantization import Quantization

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "pad_token_id": 0,
}
GPT_NEOX = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
GPT2 = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": 4}

QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
GATE_UP = ["mlp.gate_proj", "mlp.up_proj"]
LLAMA_GROUPS = [QKV, ["self_attn.o_proj"], GATE_UP, ["mlp.down_proj"]]
LAYERS = "model.layers.{}."

# family: (model class, its config's values, prefix of a layer, sibling groups of a layer, name of the head)
FAMILIES: dict[str, tuple[str, dict[str, Any], str, list[list[str]], str]] = {
    "llama": ("LlamaForCausalLM", SMALL, LAYERS, LLAMA_GROUPS, "lm_head"),
    "qwen2-tied": ("Qwen2ForCausalLM", SMALL | {"tie_word_embeddings": True}, LAYERS, LLAMA_GROUPS, "lm_head"),
    "qwen3": ("Qwen3ForCausalLM", SMALL | {"head_dim": 32}, LAYERS, LLAMA_GROUPS, "lm_head"),
    "mistral": ("MistralForCausalLM", SMALL | {"sliding_window": 8}, LAYERS, LLAMA_GROUPS, "lm_head"),
    "gemma2": ("Gemma2ForCausalLM", SMALL | {"head_dim": 32, "sliding_window": 8}, LAYERS, LLAMA_GROUPS, "lm_head"),
    "phi": (
        "PhiForCausalLM",
        SMALL,
        LAYERS,
        [QKV, ["self_attn.dense"], ["mlp.fc1"], ["mlp.fc2"]],
        "lm_head",
    ),
    "phi3": (
        "Phi3ForCausalLM",
        SMALL,
        LAYERS,
        [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
        "lm_head",
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        GPT_NEOX,
        "gpt_neox.layers.{}.",
        [
            ["attention.query_key_value"],
            ["attention.dense"],
            ["mlp.dense_h_to_4h"],
            ["mlp.dense_4h_to_h"],
        ],
        "lm_head",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        GPT2,
        "transformer.h.{}.",
        [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
        "lm_head",
    ),
}


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def family_dir(family: str, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, values, *_ = FAMILIES[family]
    return save_random(kind, values, tiny_llama_dir, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="session")
def tiny_base(tiny_llama_dir: Path) -> BaseModel:
    return load_base_model(str(tiny_llama_dir), device="cpu")


def save_random(kind: str, values: dict[str, Any], tokenizer_dir: Path, directory: Path) -> Path:
    model_class = getattr(transformers, kind)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = model_class(model_class.config_class(**values))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # fresh biases are zero: nothing would show that they are used
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    for file in TOKENIZER_FILES:
        if (tokenizer_dir / file).exists():
            shutil.copy(tokenizer_dir / file, directory)
    return directory


def tokens(count: int = 24) -> torch.Tensor:
    return torch.randint(5, 512, (1, count), generator=torch.Generator().manual_seed(3))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return out.float()


def plain(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", **options).eval()


def test_unquantized_logits_are_those_of_plain_transformers(family_dir: Path) -> None:
    base = load_base_model(str(family_dir), quantization="none", device="cpu")
    assert base.dtype == torch.float32
    torch.testing.assert_close(logits(base.model, tokens()), logits(plain(family_dir), tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", [Quantization.NF4, Quantization.INT8])
def test_quantized_logits_are_those_of_the_dequantized_weights(family_dir: Path, quantization: Quantization) -> None:
    base = load_base_model(str(family_dir), quantization=quantization, device="cpu")
    reference = plain(family_dir, dtype=torch.float32)
    dequantize_into(reference, base)
    expected, got = logits(reference, tokens()), logits(base.model, tokens())
    assert (got - expected).norm() / expected.norm() < 0.02  # bfloat16 activations
    assert quantization_changed(family_dir, reference)


def dequantize_into(reference: Any, base: BaseModel) -> None:
    """Put the weights that `base` computes with into a plain float32 model."""
    for site in {id(s): s for s in base.lora_sites.values()}.values():
        assert isinstance(site.base, FrozenLinear)
        weight = site.base.dequantized().float()
        for part, (start, stop) in zip(site.parts, site.spans, strict=True):
            target = reference.get_submodule(part.name).weight
            rows = weight[start:stop]
            target.data.copy_(rows if target.shape == rows.shape and not is_conv1d(reference, part.name) else rows.T)


def is_conv1d(model: Any, name: str) -> bool:
    return type(model.get_submodule(name)).__name__ == "Conv1D"


def quantization_changed(directory: Path, reference: Any) -> bool:
    original = plain(directory, dtype=torch.float32)
    return any(not torch.equal(a, b) for a, b in zip(original.parameters(), reference.parameters(), strict=True))


def test_siblings_that_read_the_same_input_share_a_site(family: str, family_dir: Path) -> None:
    *_, prefix, groups, head = FAMILIES[family]
    base = load_base_model(str(family_dir), quantization="none", device="cpu")
    found = {tuple(part.name for part in site.parts) for site in base.lora_sites.values()}
    expected = {tuple(prefix.format(layer) + name for name in group) for layer in (0, 1) for group in groups}
    assert found == expected | {(head,)}
    assert base.signature.head == head
    assert set(base.signature.modules) == set(base.lora_sites)
    assert not any(isinstance(module, torch.nn.Linear) for module in base.model.modules())


def test_nothing_of_the_base_wants_a_gradient(tiny_base: BaseModel) -> None:
    assert not any(p.requires_grad for p in tiny_base.model.parameters())
    assert not tiny_base.model.training


def test_the_nf4_base_answers_as_one_that_transformers_loads_with_bitsandbytes(
    tiny_base: BaseModel, tiny_llama_dir: Path
) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    reference = AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir, dtype=torch.bfloat16, quantization_config=config, device_map="cpu", attn_implementation="sdpa"
    ).eval()
    with decoding(num_rows=24, first=0):  # bitsandbytes takes the packed kernel whatever the number of rows
        ours = logits(tiny_base.model, tokens())
    assert torch.equal(ours, logits(reference, tokens()))


def test_tied_embeddings_are_one_tensor_and_stay_dense(tiny_llama_dir: Path, tmp_path: Path) -> None:
    kind, values, *_ = FAMILIES["qwen2-tied"]
    base = load_base_model(str(save_random(kind, values, tiny_llama_dir, tmp_path)), device="cpu")
    head = base.lora_sites["lm_head"].base
    assert head.weight is base.model.get_input_embeddings().weight
    assert set(base.signature.embeddings) == {"model.embed_tokens.weight", "lm_head.weight"}


def adapter_gradients(base: BaseModel, adapter: TrainableLora) -> list[torch.Tensor]:
    """Gradients of every LoRA master for a fixed next-token loss."""
    for parameter in adapter.parameters():
        parameter.grad = None
    ids = tokens()
    with routing(TrainRouting(adapter)):
        out = base.model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(out[0, :-1].float(), ids[0, 1:]).backward()
    found = []
    for parameter in adapter.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
    return found


def random_adapter(base: BaseModel) -> TrainableLora:
    adapter = TrainableLora(LoraSpec(r=4), base.signature, seed=0, device=base.device)
    with torch.no_grad():
        for parameter in adapter.b.values():
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return adapter


def serve(base: BaseModel) -> None:
    with torch.inference_mode():
        for count in (1, 7, 24):
            base.model(input_ids=tokens(count), use_cache=False)


@pytest.mark.parametrize("quantization", list(Quantization))
def test_gradients_are_the_same_before_and_after_serving(tiny_llama_dir: Path, quantization: Quantization) -> None:
    """bitsandbytes' repacked weights let no gradient through: every layer but the last learned nothing."""
    base = load_base_model(str(tiny_llama_dir), quantization=quantization, device="cpu")
    adapter = random_adapter(base)
    before = adapter_gradients(base, adapter)
    serve(base)
    after = adapter_gradients(base, adapter)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in after)


def dense_gradients(directory: Path, base: BaseModel, dtype: torch.dtype) -> torch.Tensor:
    """Those of an unquantized model that holds exactly the weights that `base` dequantizes to."""
    dense = load_base_model(str(directory), quantization="none", device="cpu", dtype=dtype)
    for name, site in dense.lora_sites.items():
        site.base.weight.data.copy_(base.lora_sites[name].base.dequantized())  # type: ignore[operator]
    return flat(adapter_gradients(dense, random_adapter(dense)))


@pytest.mark.parametrize("quantization", list(Quantization))
def test_gradients_are_those_of_a_dense_model_up_to_the_rounding_of_bfloat16(
    tiny_llama_dir: Path, quantization: Quantization
) -> None:
    base = load_base_model(str(tiny_llama_dir), quantization=quantization, device="cpu")
    serve(base)
    found = flat(adapter_gradients(base, random_adapter(base)))
    exact = dense_gradients(tiny_llama_dir, base, torch.float32)
    if base.dtype == torch.float32:
        assert relative_error(found, exact) < 1e-5
        return
    rounding = relative_error(dense_gradients(tiny_llama_dir, base, torch.bfloat16), exact)
    assert rounding < 0.06
    assert relative_error(found, exact) < 2 * rounding  # the first layer sees no gradient and takes the packed kernel


def flat(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.view(-1) for gradient in gradients])


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("quantization", list(Quantization))
def test_serving_and_training_change_no_base_parameter(tiny_llama_dir: Path, quantization: Quantization) -> None:
    base = load_base_model(str(tiny_llama_dir), quantization=quantization, device="cpu")
    before = base.parameter_hash()
    adapter = random_adapter(base)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    for _ in range(2):
        serve(base)
        adapter_gradients(base, adapter)
        optimizer.step()
    assert base.parameter_hash() == before


def test_the_parameter_hash_sees_a_single_changed_bit(tiny_llama_dir: Path) -> None:
    base = load_base_model(str(tiny_llama_dir), device="cpu")
    before = base.parameter_hash()
    codes = base.lora_sites["model.layers.1.mlp.down_proj"].base.codes
    codes[3, 5] ^= 1  # type: ignore[index, operator]
    assert base.parameter_hash() != before


def test_the_fingerprint_names_the_weights_not_how_they_are_held(tiny_llama_dir: Path, tmp_path: Path) -> None:
    prints = {load_base_model(str(tiny_llama_dir), quantization=q, device="cpu").fingerprint for q in Quantization}
    assert len(prints) == 1
    other = load_base_model(str(save_random("LlamaForCausalLM", SMALL, tiny_llama_dir, tmp_path)), device="cpu")
    assert other.fingerprint not in prints


def test_the_chat_template_makes_the_prompt_and_its_end_token_ends_answers(tiny_base: BaseModel) -> None:
    ids = tiny_base.render_chat([{"role": "user", "content": "Hi"}])
    assert tiny_base.tokenizer.decode(ids) == "<|bos|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_base.tokenizer.convert_tokens_to_ids("<|im_end|>") in tiny_base.eos_token_ids
    assert tiny_base.pad_token_id == 0
    assert tiny_base.vocab_size == 512
    assert tiny_base.max_model_len == 512


def test_a_chat_end_token_that_no_config_names_still_ends_answers(tiny_llama_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    edit(directory / "config.json", eos_token_id=2)
    edit(directory / "tokenizer_config.json", eos_token="<|eos|>")
    edit(directory / "generation_config.json", eos_token_id=[2, 7])
    base = load_base_model(str(directory), device="cpu")
    assert base.eos_token_ids == {2, 7, 4}


def test_a_tokenizer_without_a_chat_template_gets_the_default_one(tiny_llama_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    base = load_base_model(str(directory), device="cpu")
    assert base.tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = base.tokenizer.decode(base.render_chat(messages))
    assert text == "<|bos|>user: Hi\nassistant: Ho<|im_end|>\nassistant:"


def test_messages_that_the_template_refuses_are_an_error_of_the_request(tiny_llama_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    (directory / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    base = load_base_model(str(directory), device="cpu")
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        base.render_chat([{"role": "user", "content": "Hi"}])


def test_the_name_is_the_directorys_unless_one_is_given(tiny_llama_dir: Path) -> None:
    assert load_base_model(f"{tiny_llama_dir}/", device="cpu").name == tiny_llama_dir.name
    named = load_base_model(str(tiny_llama_dir), device="cpu", name="rootstock-tiny")
    assert named.name == "rootstock-tiny"
    assert {"rootstock-tiny", tiny_llama_dir.name} <= named.signature.names


def test_loading_is_quiet(tiny_llama_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_base_model(str(tiny_llama_dir), device="cpu")
    assert capfd.readouterr() == ("", "")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="does not exist"):
        load_base_model(str(tmp_path / "nowhere"), device="cpu")
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        load_base_model(str(tmp_path), device="cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="is a file"):
        load_base_model(str(tmp_path / "config.json"), device="cpu")


def test_a_hub_id_that_is_neither_cached_nor_reachable_is_refused() -> None:
    with pytest.raises(BaseModelError, match="nobody/no-such-base"):
        load_base_model("nobody/no-such-base", device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no-such-architecture"}, "no usable config"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "vit"}, "cannot be loaded"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized checkpoint"),
        ({"num_hidden_layers": 3}, "weights missing"),
        ({"intermediate_size": 256}, "cannot be loaded|another shape"),
        ({"vocab_size": 100}, "cannot be loaded|another shape"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tiny_llama_dir: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    edit(directory / "config.json", **changes)
    with pytest.raises(BaseModelError, match=message):
        load_base_model(str(directory), device="cpu")


def test_a_base_without_a_tokenizer_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    for file in TOKENIZER_FILES:
        (directory / file).unlink(missing_ok=True)
    with pytest.raises(BaseModelError, match="tokenizer"):
        load_base_model(str(directory), device="cpu")


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    directory = save_random("LlamaForCausalLM", SMALL | {"vocab_size": 300}, tiny_llama_dir, tmp_path)
    with pytest.raises(BaseModelError, match="only 300 embeddings"):
        load_base_model(str(directory), device="cpu")


def test_pickled_weights_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="safetensors"):
        load_base_model(str(directory), device="cpu")


def test_code_in_a_checkpoint_is_never_run(tiny_llama_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    edit(directory / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    (directory / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(BaseModelError, match="no usable config"):
        load_base_model(str(directory), device="cpu")


def test_an_architecture_with_attention_of_its_own_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    values = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 8}
    directory = save_random("MambaForCausalLM", values, tiny_llama_dir, tmp_path)
    with pytest.raises(BaseModelError, match=r"cannot be loaded|attention interface"):
        load_base_model(str(directory), quantization="none", device="cpu")


def test_a_width_that_nf4_cannot_hold_names_the_layer_and_the_way_out(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """bitsandbytes crashes inside its repacking at the first forward."""
    directory = save_random("LlamaForCausalLM", SMALL | {"intermediate_size": 172}, tiny_llama_dir, tmp_path)
    with pytest.raises(BaseModelError, match=r"layers\.0\.mlp\.down_proj has 172 .*--quantization none"):
        load_base_model(str(directory), device="cpu")
    load_base_model(str(directory), quantization="none", device="cpu")
    load_base_model(str(directory), quantization="int8", device="cpu")


def test_experts_outside_linear_layers_are_not_left_unquantized_in_silence(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    directory = save_random("MixtralForCausalLM", SMALL | {"num_local_experts": 4}, tiny_llama_dir, tmp_path)
    with pytest.raises(BaseModelError, match=r"outside linear layers.*--quantization none"):
        load_base_model(str(directory), device="cpu")
    base = load_base_model(str(directory), quantization="none", device="cpu")
    torch.testing.assert_close(logits(base.model, tokens()), logits(plain(directory), tokens()), rtol=1e-5, atol=1e-5)


def test_a_length_beyond_the_bases_positions_is_refused(tiny_llama_dir: Path) -> None:
    assert load_base_model(str(tiny_llama_dir), device="cpu", max_model_len=64).max_model_len == 64
    with pytest.raises(BaseModelError, match="beyond the base's 512 positions"):
        load_base_model(str(tiny_llama_dir), device="cpu", max_model_len=513)


def test_rotary_frequencies_that_change_with_length_limit_it_to_the_unchanged_range(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 32,
    }
    directory = save_random("LlamaForCausalLM", SMALL | {"rope_parameters": rope}, tiny_llama_dir, tmp_path)
    assert load_base_model(str(directory), device="cpu").max_model_len == 32


@pytest.mark.parametrize("device", ["no-such-device", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(tiny_llama_dir: Path, device: str) -> None:
    with pytest.raises(BaseModelError, match="--device"):
        load_base_model(str(tiny_llama_dir), device=device)
