"""The frozen weight of one linear layer, or of several siblings that share one product. Knows no LoRA and no model.

Gradients flow to the input, never to the weight. bitsandbytes' own layer loses that on CPU: its fast kernel wants a
repacked weight and has no derivative. So NF4 is kept twice here: packed for serving, and as bitsandbytes stores it
for the dequantizing product that training uses.

Row invariance: without gradients, a row's result has the same bits whatever the number of rows. That is why the
kernel is chosen by what a row is (one that decodes, or any other) and never by the number of rows.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from service.engine.errors import BaseModelError
from service.engine.quantization import Quantization

# bitsandbytes looks for an optional kernel package when it is imported, and logs that there is none.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))

from bitsandbytes import functional as bnb  # noqa: E402
from bitsandbytes import matmul_4bit  # type: ignore[attr-defined]  # noqa: E402

NF4_BLOCK = 64
"""Weights that share one scale; bitsandbytes' default."""

PACK_ROWS = 32
"""The packed CPU kernel takes output rows in such blocks."""

ROW_TILE = 4
"""On CPU, float32 products of fewer rows, or of a remainder, round differently: rows are padded to a multiple."""


_step = threading.local()


@contextmanager
def decoding(num_rows: int, first: int) -> Iterator[None]:
    """In this thread, inputs of `num_rows` rows end with rows that decode one token each, from row `first` on.

    Where few rows at a time are worth a kernel of their own, they get it.
    """
    _step.num_rows, _step.first = num_rows, first
    try:
        yield
    finally:
        _step.num_rows = None


@dataclass(frozen=True)
class LinearWeights:
    """One linear layer of a checkpoint; weight: [out_features, in_features]."""

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None


class FrozenLinear(nn.Module):
    """y = x W.T + b with a weight that never changes: [..., in_features] -> [..., out_features]."""

    bias: torch.Tensor | None

    def __init__(self, parts: Sequence[LinearWeights], dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = parts[0].weight.shape[1]
        self.out_features = sum(part.weight.shape[0] for part in parts)
        self.dtype = dtype
        self.register_buffer("bias", _fused_bias(parts, dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).to(self.dtype)
        if torch.is_grad_enabled():  # whatever `rows` require: a job's bits must not depend on who trains beside it
            y: torch.Tensor = _DenseProduct.apply(rows, self)  # type: ignore[no-untyped-call]
        else:
            y = self.product(rows)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def dequantized(self) -> torch.Tensor:
        """The weight as a matrix: [out_features, in_features]."""
        raise NotImplementedError

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """rows: [n, in_features] -> [n, out_features], without a derivative, the same bits for a row at every n."""
        return functional.linear(rows, self.dequantized(), self.bias)


class DenseLinear(FrozenLinear):
    """The weight and its dtype as loaded. A single layer shares the checkpoint's tensor (tied embeddings)."""

    def __init__(self, parts: Sequence[LinearWeights]) -> None:
        weights = [part.weight for part in parts]
        super().__init__(parts, weights[0].dtype)
        whole = weights[0] if len(weights) == 1 else torch.cat([w.detach() for w in weights])
        if not isinstance(whole, nn.Parameter):
            whole = nn.Parameter(whole.detach().contiguous(), requires_grad=False)
        self.weight = whole

    def dequantized(self) -> torch.Tensor:
        return self.weight

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        missing = -rows.shape[0] % ROW_TILE
        if not missing or rows.device.type != "cpu" or rows.dtype == torch.bfloat16:
            return functional.linear(rows, self.weight, self.bias)
        padded = functional.pad(rows, (0, 0, 0, missing))
        return functional.linear(padded, self.weight, self.bias)[: rows.shape[0]]


class Int8Linear(FrozenLinear):
    """One byte per weight and one scale per output row (bitsandbytes' vector-wise int8); products in bfloat16.

    The input is not quantized: with bitsandbytes' outlier columns a row's result would depend on its neighbours.
    """

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, parts: Sequence[LinearWeights], device: torch.device) -> None:
        super().__init__(parts, torch.bfloat16)
        quantized = [bnb.int8_vectorwise_quant(p.weight.detach().to(device, torch.float16))[:2] for p in parts]
        #: int8 [out_features, in_features]
        self.register_buffer("codes", torch.cat([codes for codes, _ in quantized]))
        #: float32 [out_features, 1]
        self.register_buffer("scale", torch.cat([absmax for _, absmax in quantized]).div_(127)[:, None])

    def dequantized(self) -> torch.Tensor:
        out = torch.empty(self.codes.shape, dtype=self.dtype, device=self.codes.device)
        return torch.mul(self.codes, self.scale, out=out)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """The scale is applied to the result: codes are exact in bfloat16, and a result is smaller than the weight."""
        y = functional.linear(rows, self.codes.to(self.dtype)).mul_(self.scale.view(-1))
        return y if self.bias is None else y + self.bias


class Nf4Linear(FrozenLinear):
    """4-bit NormalFloat (QLoRA, arXiv 2305.14314), double quantized; products in bfloat16 as in QLoRA.

    Each part is quantized alone, as bitsandbytes' Linear4bit would, so fusing siblings changes no value.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    packed: torch.Tensor | None
    packed_absmax: torch.Tensor | None

    def __init__(self, parts: Sequence[LinearWeights], device: torch.device) -> None:
        super().__init__(parts, torch.bfloat16)
        for part in parts:
            _check_blocks(part)
        quantized = [_quantize_nf4(part.weight.detach().to(device)) for part in parts]
        #: two weights per byte: uint8 [out_features, in_features / 2]
        self.register_buffer("codes", torch.cat([codes for codes, _ in quantized]).view(self.out_features, -1))
        #: float32 scale of each block of 64 weights: [out_features, in_features / 64]
        self.register_buffer("absmax", torch.cat([absmax for _, absmax in quantized]).view(self.out_features, -1))
        packed = packed_absmax = None
        if device.type == "cpu" and bnb.has_avx512bf16():  # type: ignore[no-untyped-call]
            packed, packed_absmax = _pack(self.codes, self.absmax)
        self.register_buffer("packed", packed)
        self.register_buffer("packed_absmax", packed_absmax)
        self._state = _state(self.absmax, self.out_features, self.in_features)

    def dequantized(self) -> torch.Tensor:
        return torch.ops.bitsandbytes.dequantize_4bit.default(  # type: ignore[no-any-return]
            self.codes, self.absmax.view(-1), NF4_BLOCK, "nf4", self._state.shape, self.dtype
        )

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        if self.packed is None:
            y: torch.Tensor = matmul_4bit(rows, self.codes.view(-1, 1), self._state, bias=self.bias)
            return y
        if getattr(_step, "num_rows", None) != rows.shape[0] or _step.first == rows.shape[0]:
            return functional.linear(rows, self.dequantized(), self.bias)
        if _step.first == 0:
            return self._packed_product(rows)
        others = functional.linear(rows[: _step.first], self.dequantized(), self.bias)
        return torch.cat((others, self._packed_product(rows[_step.first :])))

    def _packed_product(self, rows: torch.Tensor) -> torch.Tensor:
        """Faster than to dequantize while there are fewer than about fifty rows, slower beyond."""
        assert self.packed is not None
        shape = (self.packed.shape[0], self.in_features)
        y = torch.ops.bitsandbytes.gemv_4bit.default(  # a full matrix product, despite the name
            rows.contiguous(), self.packed, shape, self.packed_absmax, self._state.code, NF4_BLOCK
        )[:, : self.out_features]
        dense: torch.Tensor = y.contiguous() if self.bias is None else y + self.bias
        return dense


def freeze(parts: Sequence[LinearWeights], quantization: Quantization, device: torch.device) -> FrozenLinear:
    """One frozen layer for sibling linears, their outputs side by side. Quantized weights are put on `device`
    at once, layer by layer; dense ones follow when the whole model is moved.

    Raises:
        BaseModelError: the shape does not allow this quantization; the message names the layer.
    """
    if quantization is Quantization.NF4:
        return Nf4Linear(parts, device)
    if quantization is Quantization.INT8:
        return Int8Linear(parts, device)
    return DenseLinear(parts)


class _DenseProduct(torch.autograd.Function):
    """The differentiable product. The weight is dequantized again for backward: keeping it would cost its size."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        ctx.layer = layer
        return functional.linear(rows, layer.dequantized(), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        weight = ctx.layer.dequantized()
        if grad.shape[0] == 1:  # a single row is multiplied by another kernel, which rounds differently
            return (functional.pad(grad, (0, 0, 0, 1)) @ weight)[:1], None
        return grad @ weight, None


def _fused_bias(parts: Sequence[LinearWeights], dtype: torch.dtype) -> torch.Tensor | None:
    """Biases side by side, zeros for a sibling without one; None when no part has one."""
    if all(part.bias is None for part in parts):
        return None
    biases = [part.weight.new_zeros(part.weight.shape[0]) if part.bias is None else part.bias for part in parts]
    return torch.cat([bias.detach().to(dtype) for bias in biases])


def _check_blocks(part: LinearWeights) -> None:
    if part.weight.shape[1] % NF4_BLOCK:
        raise BaseModelError(
            f"layer {part.name} has {part.weight.shape[1]} input features; nf4 needs a multiple of {NF4_BLOCK}."
            " Load this base with --quantization none (or int8)",
            param="quantization",
        )


def _quantize_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and float32 block scales, the scales having gone through double quantization."""
    codes, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return codes.view(-1), absmax.float()


def _pack(codes: torch.Tensor, absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The layout of the AVX512-BF16 kernel. Output rows are padded with zeros to whole blocks."""
    missing = -codes.shape[0] % PACK_ROWS
    codes, absmax = (functional.pad(t, (0, 0, 0, missing)) for t in (codes, absmax))
    state = _state(absmax, codes.shape[0], codes.shape[1] * 2)
    packed, state = bnb._convert_weight_packed_for_cpu(codes, state)
    return packed, state.absmax


def _state(absmax: torch.Tensor, out_features: int, in_features: int) -> Any:
    """What bitsandbytes' functions want to know of a weight whose scales are no longer quantized."""
    return bnb.QuantState(  # type: ignore[no-untyped-call]
        absmax=absmax.view(-1),
        shape=torch.Size((out_features, in_features)),
        dtype=torch.bfloat16,
        blocksize=NF4_BLOCK,
        code=bnb.get_4bit_type("nf4", device=absmax.device),  # type: ignore[no-untyped-call]
        quant_type="nf4",
    )
