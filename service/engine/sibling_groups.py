"""Finds the linear layers of a model, and which of them read the very same input (q/k/v, gate/up).

By watching a forward, not by names: any architecture will do. Knows no weights and no LoRA.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import groupby

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Every plain linear layer by name. A subclass with a forward of its own (a router, say) is not one."""
    forwards = (nn.Linear.forward, Conv1D.forward)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and type(module).forward in forwards
    }


def output_head(model: PreTrainedModel) -> str | None:
    """The name of the linear layer that makes the logits."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return next((name for name, module in model.named_modules() if module is head), None)


def sibling_groups(
    model: PreTrainedModel, linears: Mapping[str, Linear], head: str | None, input_ids: torch.Tensor
) -> list[list[str]]:
    """Names that can share one product, group by group; every layer is in exactly one group.

    Siblings are called one right after the other, once each, with the identical tensor object. A layer that the
    forward did not reach, or reached twice, stays alone; so does the head.
    """
    calls = _watch(model, linears, input_ids)
    times = Counter(name for name, _ in calls)
    groups: list[list[str]] = []
    for _, run in groupby(calls, key=lambda call: id(call[1])):
        together = [name for name, _ in run if times[name] == 1 and name != head]
        if together:
            groups.append(together)
    grouped = {name for group in groups for name in group}
    return groups + [[name] for name in linears if name not in grouped]


def _watch(
    model: PreTrainedModel, linears: Mapping[str, Linear], input_ids: torch.Tensor
) -> list[tuple[str, torch.Tensor]]:
    """Which layer was called with which tensor, in order. The tensors are kept, so that no id is used twice."""
    calls: list[tuple[str, torch.Tensor]] = []

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        return linears[name].register_forward_pre_hook(lambda _, inputs: calls.append((name, inputs[0])))

    handles = [watch(name) for name in linears]
    try:
        with torch.inference_mode():
            model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls
