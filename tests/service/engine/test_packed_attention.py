"""The packed attention of training: the spelled-out kernel for short bfloat16 rows equals the fused one."""

from __future__ import annotations

import pytest
import torch

from adapters.packing import PackedBatch
from service.engine import attention


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 3])
def test_short_attention_equals_the_fused_kernel_in_values_and_gradients(
    kv_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = PackedBatch([7, 3, 12])
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 22, heads, 16) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=generator).bfloat16().transpose(1, 2).requires_grad_() for shape in shapes]
    weight = torch.randn(1, 22, 4, 16, generator=generator).bfloat16()
    results = []
    for short in (0, 256):
        monkeypatch.setattr(attention, "SHORT", short)
        out = attention._packed(pack, inputs[0], inputs[1], inputs[2], 0.25, window, None)
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    exact = [x.detach().float().requires_grad_() for x in inputs]
    out = attention._packed(pack, exact[0], exact[1], exact[2], 0.25, window, None)
    reference = [out, *torch.autograd.grad((out * weight).sum(), exact)]
    for fused, spelled_out, right in zip(*results, reference, strict=True):
        torch.testing.assert_close(spelled_out.float(), right, rtol=0.03, atol=0.03)
        torch.testing.assert_close(fused.float(), right, rtol=0.03, atol=0.03)
