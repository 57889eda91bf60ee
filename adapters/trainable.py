"""The fp32 masters of one adapter in training, and the routing that lets gradients reach them.

Knows the sites it adapts, not the optimizer, the data or the job.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from adapters.lora import BatchedLoraLinear
from adapters.peft_format import BaseSignature, LoraPair, LoraSpec, LoraWeights


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

    def apply(self, site: BatchedLoraLinear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + (x A.T) B.T * scaling for each adapted part; siblings share one product with their stacked A."""
        adapted = [(i, p.name) for i, p in enumerate(site.parts) if p.name in self.adapter.a]
        if not adapted:
            return y
        spec = self.adapter.spec
        x = x.to(torch.float32)
        if spec.lora_dropout and self.training:
            kept = torch.rand(x.shape, generator=self.generator, device=x.device) >= spec.lora_dropout
            x = x * kept / (1 - spec.lora_dropout)
        factors: list[torch.Tensor] = [self.adapter.a[name] for _, name in adapted]
        h = x @ (factors[0] if len(factors) == 1 else torch.cat(factors)).T
        slices = torch.split(h, [a.shape[0] for a in factors], dim=-1)
        deltas = {i: (s @ self.adapter.b[n].T) * spec.scaling_of(n) for (i, n), s in zip(adapted, slices, strict=True)}
        if len(site.parts) == 1:
            return y + deltas[0].to(y.dtype)
        pieces = [y[..., start:stop] for start, stop in site.spans]
        return torch.cat([p + deltas[i].to(y.dtype) if i in deltas else p for i, p in enumerate(pieces)], dim=-1)
