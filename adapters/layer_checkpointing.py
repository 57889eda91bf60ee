"""Activation checkpointing by thread: one thread's layers are recomputed in its backward, others notice nothing.

transformers' own switch is a flag on the module that serves others (and works in `train()` mode only). Here each
layer's `forward` looks at the calling thread, as a LoRA site does. A backward may run in another thread than its
forward (CUDA does so), so what belongs to the forward's thread, its routing and its pack, travels with the checkpoint.
Knows no model beyond its list of layers. Chen et al., arXiv 1604.06174.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adapters.lora import BatchedLoraLinear, current_route, routing
from adapters.packing import current_pack, packed_as
from adapters.segment_routing import SegmentRouting
from adapters.trainable import TrainRouting

_current = threading.local()


@contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """Forwards of this thread inside the block keep only what enters a layer, and compute it again for gradients."""
    _prepare(model)
    before = getattr(_current, "on", False)
    _current.on = True
    try:
        yield
    finally:
        _current.on = before


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's list of layers: of all module lists the one that holds most LoRA sites."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=_num_sites, default=[]))


class _LayerForward:
    """Stands where a layer's own `forward` stood and does the same, unless the thread asks for recomputing."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        functools.update_wrapper(self, forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (getattr(_current, "on", False) and torch.is_grad_enabled()):
            return self.forward(*args, **kwargs)
        # The global generator is everybody's, and nothing here draws from it: dropout has one of its own.
        return checkpoint(
            self.forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts, **kwargs
        )


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the forward: nothing. Around its repetition: the routing and the pack as they are now."""
    route, pack = current_route(), current_pack()
    remembered = route.snapshot() if isinstance(route, TrainRouting | SegmentRouting) else route

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(routing(remembered))
            stack.enter_context(packed_as(pack))
            yield

    return nullcontext(), again()


def _prepare(model: nn.Module) -> None:
    for layer in decoder_layers(model):
        if not isinstance(layer.forward, _LayerForward):
            layer.forward = _LayerForward(layer.forward)


def _num_sites(module: nn.Module) -> int:
    return sum(isinstance(child, BatchedLoraLinear) for child in module.modules())
