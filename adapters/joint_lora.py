"""What several adapters in training add at one site, in batched products: a few launches, whatever their number.

    y[rows of i] += (x[rows of i] A_i.T) B_i.T * scaling_i

Rows are laid out as [adapters, longest, in] and ranks are padded with zeros, so one product serves all, and nothing
of one adapter, not even a NaN, meets another's rows. Sums are cut differently from training alone: equal to it within
rounding, not to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from adapters.lora import BatchedLoraLinear
from adapters.packing import PackedBatch
from adapters.trainable import TrainRouting


def add_together(
    site: BatchedLoraLinear, routes: Sequence[TrainRouting], layout: PackedBatch, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """y with what each route's adapter adds to its own rows; `layout` has one "sequence" for each route."""
    if any(route.drops for route in routes):
        parts = torch.split(x, layout.lengths, dim=-2)
        x = torch.cat([route.dropped(part) for route, part in zip(routes, parts, strict=True)], dim=-2)
    plan = _Plan(site, routes, layout)
    factors = [factor for owner, name in plan.pairs for factor in (owner.adapter.a[name], owner.adapter.b[name])]
    added: torch.Tensor = _AddTogether.apply(y, x.to(y.dtype), plan, *factors)  # type: ignore[no-untyped-call]
    return added


class _Plan:
    """Where each factor lies in the stacked ones: part p has ranks [starts[p], starts[p + 1]) of the stacked A."""

    def __init__(self, site: BatchedLoraLinear, routes: Sequence[TrainRouting], layout: PackedBatch) -> None:
        self.layout = layout
        self.num_routes = len(routes)
        self.pairs: list[tuple[TrainRouting, str]] = []
        self.places: list[tuple[int, int, int, float]] = []  # route, part, rank, scaling
        self.spans: list[tuple[int, int]] = []
        self.starts = [0]
        for part, span in zip(site.parts, site.spans, strict=True):
            owners = [(i, route) for i, route in enumerate(routes) if part.name in route.adapter.a]
            if not owners:
                continue
            for index, route in owners:
                spec = route.adapter.spec
                self.pairs.append((route, part.name))
                place = (index, len(self.spans), spec.rank_of(part.name), spec.scaling_of(part.name))
                self.places.append(place)
            self.spans.append(span)
            self.starts.append(self.starts[-1] + max(route.adapter.spec.rank_of(part.name) for _, route in owners))

    def stacked(self, factors: Sequence[torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A: [routes, all ranks, in]; of each part B: [routes, out, ranks], scaled; in the dtype of x."""
        a = x.new_zeros(self.num_routes, self.starts[-1], x.shape[-1])
        b = [
            x.new_zeros(self.num_routes, stop - start, self.starts[i + 1] - self.starts[i])
            for i, (start, stop) in enumerate(self.spans)
        ]
        targets_a = [a[route, self.starts[part] : self.starts[part] + rank] for route, part, rank, _ in self.places]
        targets_b = [b[part][route, :, :rank] for route, part, rank, _ in self.places]
        scaled = torch._foreach_mul(list(factors[1::2]), [scaling for *_, scaling in self.places])
        torch._foreach_copy_(targets_a + targets_b, [*factors[::2], *scaled])
        return a, b

    def padded(self, rows: torch.Tensor) -> torch.Tensor:
        """rows: [tokens, n] -> [routes, longest, n], padding repeats a row."""
        rows = rows if self.layout.even else rows.index_select(0, self.layout.pad_index)
        return rows.reshape(self.num_routes, self.layout.width, -1)

    def padded_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The same with zeros as padding: nothing is learned from it."""
        if not self.layout.even:
            zeros = grad.new_zeros(self.num_routes * self.layout.width, grad.shape[-1])
            grad = zeros.index_copy_(0, self.layout.unpad_index, grad)
        return grad.reshape(self.num_routes, self.layout.width, -1)

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """[routes, longest, n] -> [tokens, n]."""
        rows = x.flatten(0, 1)
        return rows if self.layout.even else rows.index_select(0, self.layout.unpad_index)


class _AddTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, plan: _Plan, *factors: torch.Tensor) -> torch.Tensor:
        """x: [..., in], y: [..., out]; `factors` are A and B of each of the plan's pairs."""
        rows = plan.padded(x.reshape(-1, x.shape[-1]))
        a, b = plan.stacked(factors, rows)
        h = torch.bmm(rows, a.transpose(1, 2))
        out = y.reshape(-1, y.shape[-1]).clone()
        for i, (start, stop) in enumerate(plan.spans):
            h_part = h[..., plan.starts[i] : plan.starts[i + 1]]
            out[:, start:stop] += plan.flat(torch.bmm(h_part, b[i].transpose(1, 2)))
        ctx.save_for_backward(rows, h, a, *b)
        ctx.plan, ctx.x_shape = plan, x.shape
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        rows, h, a, *b = ctx.saved_tensors
        plan: _Plan = ctx.plan
        padded = plan.padded_gradient(grad.reshape(-1, grad.shape[-1]))
        parts = [padded[..., start:stop] for start, stop in plan.spans]
        grad_h = torch.cat([torch.bmm(part, factor) for part, factor in zip(parts, b, strict=True)], dim=2)
        grad_a = torch.bmm(grad_h.transpose(1, 2), rows).float()
        bounds = list(zip(plan.starts, plan.starts[1:], strict=False))
        grad_b = [
            torch.bmm(part.transpose(1, 2), h[..., start:stop]).float()
            for part, (start, stop) in zip(parts, bounds, strict=True)
        ]
        factors: list[torch.Tensor] = []
        for route, part, rank, scaling in plan.places:
            start = plan.starts[part]
            factors += [grad_a[route, start : start + rank], grad_b[part][route, :, :rank] * scaling]
        grad_x = plan.flat(torch.bmm(grad_h, a)).view(ctx.x_shape) if ctx.needs_input_grad[1] else None
        return grad, grad_x, None, *factors
