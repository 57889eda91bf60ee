"""Which run each stretch of a joint forward belongs to: several adapters in training on one flat row of tokens.

Each stretch gets exactly what its own `TrainRouting` would add if it were alone. Knows no optimizer and no job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from adapters.joint_lora import add_together
from adapters.lora import BatchedLoraLinear
from adapters.packing import PackedBatch
from adapters.trainable import TrainRouting


@dataclass(frozen=True)
class SegmentRouting:
    """`rows[i]` consecutive tokens belong to `routes[i]`; the output head sees `head_rows[i]` of them.

    `batched`: products of all runs in one launch each, for devices where launches are what costs. Otherwise run by
    run, in the shapes, and so with the bits, of training alone.
    """

    routes: Sequence[TrainRouting]
    rows: Sequence[int]
    head_rows: Sequence[int]
    batched: bool = False

    @cached_property
    def _layout(self) -> PackedBatch:
        return PackedBatch(self.rows, self.routes[0].adapter.parameters()[0].device)

    @cached_property
    def _head_layout(self) -> PackedBatch:
        return PackedBatch(self.head_rows, self.routes[0].adapter.parameters()[0].device)

    def snapshot(self) -> SegmentRouting:
        """The same with everybody's dropout randomness as it is now."""
        return replace(self, routes=[route.snapshot() for route in self.routes])

    def apply(self, site: BatchedLoraLinear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x: [..., tokens, in], y: [..., tokens, out]."""
        adapted = [any(part.name in route.adapter.a for part in site.parts) for route in self.routes]
        if not any(adapted):
            return y
        sizes = list(self.head_rows if site.is_head else self.rows)
        if self.batched:
            layout = self._head_layout if site.is_head else self._layout
            return add_together(site, self.routes, layout, x, y)
        stretches = zip(self.routes, torch.split(x, sizes, dim=-2), torch.split(y, sizes, dim=-2), strict=True)
        return torch.cat([route.apply(site, x_part, y_part) for route, x_part, y_part in stretches], dim=-2)
