"""One frozen layer: exact values, gradients after serving, and rows that never depend on their neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]

from service.engine.errors import BaseModelError
from service.engine.frozen_linear import FrozenLinear, LinearWeights, Nf4Linear, decoding, freeze
from service.engine.quantization import Quantization

CPU = torch.device("cpu")
NUM_ROWS = [*range(1, 65), 100, 127, 129, 256]
DTYPES = {
    Quantization.NF4: torch.bfloat16,
    Quantization.INT8: torch.bfloat16,
    Quantization.NONE: torch.float32,
}
KINDS = [(kind, dtype) for kind, dtype in DTYPES.items()] + [(Quantization.NONE, torch.bfloat16)]


def weights(
    *outs: int, in_features: int = 128, dtype: torch.dtype = torch.bfloat16, bias: bool = False
) -> list[LinearWeights]:
    generator = torch.Generator().manual_seed(1)
    return [
        LinearWeights(
            f"layer.{i}",
            torch.randn(out, in_features, generator=generator).mul_(0.05).to(dtype),
            torch.randn(out, generator=generator).to(dtype) if bias else None,
        )
        for i, out in enumerate(outs)
    ]


def as_bitsandbytes(part: LinearWeights) -> Linear4bit:
    """The layer that transformers would put there for a BitsAndBytesConfig with nf4 and double quantization."""
    out, in_features = part.weight.shape
    layer = Linear4bit(
        in_features,
        out,
        bias=part.bias is not None,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
    )
    layer.weight = Params4bit(part.weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    if part.bias is not None:
        layer.bias = torch.nn.Parameter(part.bias.clone(), requires_grad=False)
    return layer.to("cpu").eval()


def test_fused_nf4_siblings_hold_exactly_what_bitsandbytes_layers_hold() -> None:
    parts = weights(96, 32, 64)
    references = [as_bitsandbytes(part).weight for part in parts]
    expected = torch.cat([dequantize_4bit(w.data, w.quant_state) for w in references])  # type: ignore[attr-defined]
    assert torch.equal(freeze(parts, Quantization.NF4, CPU).dequantized(), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_fused_nf4_siblings_answer_exactly_as_bitsandbytes_layers_do(bias: bool) -> None:
    parts = weights(96, 32, 64, bias=bias)
    x = torch.randn(7, 128, dtype=torch.bfloat16)
    with torch.no_grad(), decoding(num_rows=7, first=0):
        expected = torch.cat([as_bitsandbytes(part)(x) for part in parts], dim=-1)
        assert torch.equal(freeze(parts, Quantization.NF4, CPU)(x), expected)


def test_an_odd_number_of_output_features_is_padded_for_the_packed_kernel() -> None:
    """bitsandbytes asserts `N % 32 == 0` when it repacks."""
    layer = freeze(weights(33, 5), Quantization.NF4, CPU)
    x = torch.randn(2, 3, 128, dtype=torch.bfloat16)
    with torch.no_grad(), decoding(num_rows=6, first=0):
        y = layer(x)
    assert y.shape == (2, 3, 38)
    assert y.is_contiguous()
    torch.testing.assert_close(y, x @ layer.dequantized().T, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no packed kernel to avoid")
def test_without_the_packed_kernel_the_values_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = weights(96, 32, bias=True)
    packed = freeze(parts, Quantization.NF4, CPU)
    monkeypatch.setattr("service.engine.frozen_linear.bnb.has_avx512bf16", lambda: False)
    plain = freeze(parts, Quantization.NF4, CPU)
    assert isinstance(packed, Nf4Linear) and packed.packed is not None
    assert isinstance(plain, Nf4Linear) and plain.packed is None
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    with torch.no_grad(), decoding(num_rows=5, first=0):
        torch.testing.assert_close(packed(x), plain(x), rtol=2e-2, atol=2e-2)
    assert torch.equal(packed.dequantized(), plain.dequantized())


def test_int8_weights_are_bitsandbytes_vectorwise_ones() -> None:
    from bitsandbytes.functional import int8_vectorwise_quant

    parts = weights(48, 16)
    expected = torch.cat(
        [int8_vectorwise_dequant(*int8_vectorwise_quant(p.weight.half())[:2]).to(torch.bfloat16) for p in parts]
    )
    torch.testing.assert_close(freeze(parts, Quantization.INT8, CPU).dequantized(), expected, rtol=4e-3, atol=1e-6)


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("shape", [(192, 128), (64, 256), (70, 64)])
@pytest.mark.parametrize("decodes", [False, True], ids=["any row", "decode row"])
def test_a_row_has_the_same_bits_in_every_crowd(
    kind: Quantization, dtype: torch.dtype, shape: tuple[int, int], decodes: bool
) -> None:
    out, in_features = shape
    layer = freeze(weights(out, in_features=in_features, dtype=dtype, bias=True), kind, CPU)
    x = torch.randn(256, in_features, dtype=dtype)

    def product(rows: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), decoding(len(rows), 0) if decodes else nullcontext():
            result: torch.Tensor = layer(rows)
            return result

    expected = product(x)
    for num_rows in NUM_ROWS:
        for start in (0, min(3, 256 - num_rows)):
            rows = slice(start, start + num_rows)
            assert torch.equal(product(x[rows]), expected[rows]), f"{num_rows} rows from {start}"


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("kind", list(Quantization))
@pytest.mark.parametrize("shape", [(192, 128), (70, 64), (1536, 512)])
def test_in_training_too_a_bfloat16_row_and_its_gradient_have_the_same_bits_in_every_crowd(
    kind: Quantization, shape: tuple[int, int]
) -> None:
    """Jobs train beside others; a single row's gradient used to come from another kernel."""
    out, in_features = shape
    layer = freeze(weights(out, in_features=in_features), kind, CPU)
    x, upstream = torch.randn(256, in_features).bfloat16(), torch.randn(256, out).bfloat16()
    expected, expected_gradient = layer(x.clone().requires_grad_()), gradient(layer, x, upstream)
    for num_rows in (1, 2, 3, 5, 31, 100):
        for start in (0, 3, *(range(10, 40) if num_rows == 1 else [127])):
            rows = slice(start, start + num_rows)
            assert torch.equal(layer(x[rows]), expected[rows]), f"{num_rows} rows from {start}, no gradient wanted"
            assert torch.equal(gradient(layer, x[rows], upstream[rows]), expected_gradient[rows]), (num_rows, start)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_prompt_rows_and_decode_rows_of_one_step_do_not_mind_each_other(kind: Quantization, dtype: torch.dtype) -> None:
    layer = freeze(weights(96, 32, dtype=dtype, bias=True), kind, CPU)
    x = torch.randn(12, 128, dtype=dtype)
    with torch.inference_mode():
        prompt = layer(x[:8])
        with decoding(4, 0):
            decoded = layer(x[8:])
        with decoding(12, 8):
            assert torch.equal(layer(x), torch.cat((prompt, decoded)))


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_gradients_after_serving_equal_those_before_and_a_dense_reference(
    kind: Quantization, dtype: torch.dtype
) -> None:
    """bitsandbytes repacks at the first served row; from then on no gradient reached the input."""
    layer = freeze(weights(96, 32, dtype=dtype, bias=True), kind, CPU)
    x, upstream = torch.randn(9, 128, dtype=dtype), torch.randn(9, 128, dtype=dtype)
    before = gradient(layer, x, upstream)
    with torch.inference_mode():
        layer(x)
    after = gradient(layer, x, upstream)
    assert torch.equal(before, after)
    dense = upstream.float() @ layer.dequantized().float()
    error = (after.float() - dense).norm() / dense.norm()
    assert error < (1e-6 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_training_and_serving_compute_the_same_function(kind: Quantization, dtype: torch.dtype) -> None:
    layer = freeze(weights(96, 32, dtype=dtype), kind, CPU)
    x = torch.randn(9, 128, dtype=dtype)
    with torch.no_grad():
        served = layer(x).float()
    trained = layer(x.requires_grad_()).detach().float()
    assert (served - trained).norm() / served.norm() < 5e-3


@pytest.mark.parametrize("kind", list(Quantization))
def test_nothing_but_the_input_ever_wants_a_gradient(kind: Quantization) -> None:
    layer = freeze(weights(64, dtype=DTYPES[kind]), kind, CPU).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(3, 128, dtype=DTYPES[kind], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in layer.parameters())
    assert before.keys() == layer.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_a_float32_input_comes_back_as_float32() -> None:
    layer = freeze(weights(64), Quantization.NF4, CPU)
    assert layer(torch.randn(2, 128)).dtype == torch.float32


def test_a_single_dense_layer_shares_the_checkpoints_tensor() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 4), requires_grad=False)
    layer = freeze([LinearWeights("lm_head", weight, None)], Quantization.NONE, CPU)
    assert layer.weight is weight


def test_a_missing_bias_among_siblings_counts_as_zero() -> None:
    with_bias, without = weights(32, bias=True)[0], weights(32, 32)[1]
    layer = freeze([with_bias, without], Quantization.NONE, CPU)
    assert layer.bias is not None and with_bias.bias is not None
    assert torch.equal(layer.bias, torch.cat([with_bias.bias, torch.zeros(32, dtype=torch.bfloat16)]))


def test_nf4_refuses_a_width_its_blocks_do_not_fit_and_names_the_layer() -> None:
    with pytest.raises(BaseModelError, match=r"layer\.0 has 172 input features.*--quantization none"):
        freeze(weights(64, in_features=172), Quantization.NF4, CPU)


def gradient(layer: FrozenLinear, x: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(upstream)
    assert leaf.grad is not None
    return leaf.grad
