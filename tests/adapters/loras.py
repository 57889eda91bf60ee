"""Random adapters for tests: weights big enough to change every answer."""

from __future__ import annotations

import torch

from adapters.lora_weights import BaseSignature, LoraPair, LoraSpec, LoraWeights


def random_lora(base: BaseSignature, *, seed: int, spec: LoraSpec | None = None, size: float = 0.15) -> LoraWeights:
    """An adapter with normal weights of standard deviation `size` in every module of the spec."""
    spec = spec or LoraSpec(r=8, lora_alpha=16)
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * size

    modules = {}
    for name in spec.matching(base):
        shape, rank = base.modules[name], spec.rank_of(name)
        pair = LoraPair(normal(rank, shape.in_features), normal(shape.out_features, rank), spec.scaling_of(name))
        modules[name] = pair
    return LoraWeights(spec, modules)
