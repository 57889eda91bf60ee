"""The fp32 masters of one adapter in training, and the routing that lets gradients reach them.

Knows the sites it adapts, not the optimizer, the data or the job.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from adapters.lora import BatchedLoraLinear
from adapters.lora_weights import BaseSignature, LoraPair, LoraSpec, LoraWeights
from adapters.pausing import current_pause


class TrainableLora:
    """`a[name]`: [r, in] and `b[name]`: [out, r] for every adapted module, initialised as PEFT does."""

    def __init__(self, spec: LoraSpec, base: BaseSignature, *, seed: int, device: torch.device) -> None:
        self.spec = spec
        self.names = spec.matching(base)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        self.a: dict[str, nn.Parameter] = {}
        self.b: dict[str, nn.Parameter] = {}
        for name in self.names:
            shape, rank = base.modules[name], spec.rank_of(name)
            a = torch.empty(rank, shape.in_features)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            self.a[name] = nn.Parameter(a.to(device))
            self.b[name] = nn.Parameter(torch.zeros(shape.out_features, rank, device=device))

    def parameters(self) -> list[nn.Parameter]:
        """All masters, A before B, module by module."""
        return [p for name in self.names for p in (self.a[name], self.b[name])]

    def weights(self) -> LoraWeights:
        """A copy of the masters as they are now, in host memory."""
        pairs = {
            n: LoraPair(
                self.a[n].detach().to("cpu", copy=True),
                self.b[n].detach().to("cpu", copy=True),
                self.spec.scaling_of(n),
            )
            for n in self.names
        }
        return LoraWeights(self.spec, pairs)

    @torch.no_grad()
    def load(self, modules: Mapping[str, LoraPair]) -> None:
        """Overwrite the masters in place. Shapes have been checked by whoever read the pairs."""
        for name in self.names:
            self.a[name].copy_(modules[name].a)
            self.b[name].copy_(modules[name].b)


@dataclass(frozen=True)
class TrainRouting:
    """Training and scoring: every row belongs to one adapter, gradients flow to its masters and to x."""

    adapter: TrainableLora
    training: bool = True
    generator: torch.Generator | None = None
    """Dropout's randomness; the global generator belongs to every thread, so no run could be repeated with it."""

    def snapshot(self) -> TrainRouting:
        """The same with dropout's randomness as it is now."""
        if self.generator is None:
            return self
        copy = torch.Generator(self.generator.device)
        copy.set_state(self.generator.get_state())
        return replace(self, generator=copy)

    @property
    def drops(self) -> bool:
        """Whether dropout is on."""
        return self.training and self.adapter.spec.lora_dropout > 0

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x after dropout, where there is any."""
        if not self.drops:
            return x
        share = self.adapter.spec.lora_dropout
        kept = torch.rand(x.shape, generator=self.generator, device=x.device) >= share
        return x * kept / (1 - share)

    def apply(self, site: BatchedLoraLinear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + (x A.T) B.T * scaling for each adapted part; siblings share one product with their stacked A."""
        if (pause := current_pause()) is not None:
            pause()
        adapted = [(i, p.name) for i, p in enumerate(site.parts) if p.name in self.adapter.a]
        if not adapted:
            return y
        spec = self.adapter.spec
        x = self.dropped(x)
        factors = [factor for _, name in adapted for factor in (self.adapter.a[name], self.adapter.b[name])]
        spans = [site.spans[index] for index, _ in adapted]
        scalings = [spec.scaling_of(name) for _, name in adapted]
        added: torch.Tensor = _AddLora.apply(y, x.to(y.dtype), spans, scalings, *factors)  # type: ignore[no-untyped-call]
        return added


class _AddLora(torch.autograd.Function):
    """y[:, span] + (x A.T) B.T * scaling for each adapted part of a site.

    Computed in the base's activation dtype, as it will be served; gradients reach the fp32 masters as fp32. One node
    instead of a dozen: on small models these products cost less than their bookkeeping did.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        spans: Sequence[tuple[int, int]],
        scalings: Sequence[float],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        """x: [..., in], y: [..., out]; `factors` are A and B of the first part, of the second, …"""
        rows = x.reshape(-1, x.shape[-1])
        out = y.reshape(-1, y.shape[-1]).clone()
        a = torch.cat(factors[::2]).to(x.dtype)
        scaled = [(b * scaling).to(x.dtype) for b, scaling in zip(factors[1::2], scalings, strict=True)]
        h = rows @ a.T
        h_parts = torch.split(h, [b.shape[1] for b in scaled], dim=1)
        for (start, stop), h_part, b in zip(spans, h_parts, scaled, strict=True):
            out[:, start:stop].addmm_(h_part, b.T)
        ctx.save_for_backward(rows, h, a, *scaled)
        ctx.spans, ctx.scalings, ctx.x_shape = spans, scalings, x.shape
        ctx.pause = current_pause()  # on CUDA, autograd calls backward in a thread of its own
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        if ctx.pause is not None:
            ctx.pause()
        rows, h, a, *scaled = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        ranks = [b.shape[1] for b in scaled]
        slices = [grad_rows[:, start:stop] for start, stop in ctx.spans]
        grad_h = torch.cat([part @ b for part, b in zip(slices, scaled, strict=True)], dim=1)
        grad_a = torch.split((grad_h.T @ rows).float(), ranks)
        grad_b = [
            (part.T @ h_part).float() * scaling
            for part, h_part, scaling in zip(slices, torch.split(h, ranks, dim=1), ctx.scalings, strict=True)
        ]
        grad_x = (grad_h @ a).view(ctx.x_shape) if ctx.needs_input_grad[1] else None
        factors = [gradient for pair in zip(grad_a, grad_b, strict=True) for gradient in pair]
        return grad, grad_x, None, None, *factors
