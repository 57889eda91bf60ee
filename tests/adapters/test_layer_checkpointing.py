"""Layers computed twice give the same gradients, and only the thread that asked computes them twice."""

from __future__ import annotations

import threading
from dataclasses import replace

import torch
from torch import nn

from adapters.layer_checkpointing import decoder_layers, recomputed_layers
from adapters.lora import routing
from adapters.lora_weights import LoraSpec
from adapters.packing import packed_sequences
from adapters.trainable import TrainableLora, TrainRouting
from tests.adapters.conftest import GraftedBase

IDS = torch.arange(5, 25)[None]


class _Counter:
    """How often layers ran, by thread."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[int] = []
        norms = [layer.input_layernorm for layer in decoder_layers(model)]
        self._hooks = [norm.register_forward_hook(self._note) for norm in norms]  # type: ignore[union-attr]

    def _note(self, *_: object) -> None:
        self.seen.append(threading.get_ident())

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _gradients(base: GraftedBase, adapter: TrainableLora, *, recompute: bool) -> list[torch.Tensor]:
    route = TrainRouting(adapter, generator=torch.Generator().manual_seed(1))
    for parameter in adapter.parameters():
        parameter.grad = None
    with routing(route), packed_sequences([12, 8]) as pack:
        if recompute:
            with recomputed_layers(base.model):
                logits = base.model(input_ids=IDS, position_ids=pack.position_ids, use_cache=False).logits
        else:
            logits = base.model(input_ids=IDS, position_ids=pack.position_ids, use_cache=False).logits
    logits.square().mean().backward()  # outside of routing and pack, as in another thread
    return [p.grad.clone() for p in adapter.parameters() if p.grad is not None]


def _adapter(base: GraftedBase, dropout: float = 0.0) -> TrainableLora:
    spec = replace(LoraSpec(r=4), lora_dropout=dropout)
    adapter = TrainableLora(spec, base.signature, seed=3, device=torch.device("cpu"))
    with torch.no_grad():
        for name in adapter.names:
            adapter.b[name].normal_(std=0.1, generator=torch.Generator().manual_seed(5))
    return adapter


def test_gradients_are_the_same_to_the_last_bit_with_dropout_too(grafted: GraftedBase) -> None:
    for dropout in (0.0, 0.4):
        adapter = _adapter(grafted, dropout)
        plain = _gradients(grafted, adapter, recompute=False)
        again = _gradients(grafted, adapter, recompute=True)
        assert len(plain) == len(again) == len(adapter.parameters())
        assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_a_backward_in_another_thread_finds_the_forwards_routing_and_pack(grafted: GraftedBase) -> None:
    """CUDA runs backwards in a thread of its own."""
    adapter = _adapter(grafted)
    expected = _gradients(grafted, adapter, recompute=False)
    for parameter in adapter.parameters():
        parameter.grad = None
    with routing(TrainRouting(adapter)), packed_sequences([12, 8]) as pack, recomputed_layers(grafted.model):
        logits = grafted.model(input_ids=IDS, position_ids=pack.position_ids, use_cache=False).logits
    thread = threading.Thread(target=lambda: logits.square().mean().backward())
    thread.start()
    thread.join()
    found = [p.grad for p in adapter.parameters() if p.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_every_layer_runs_again_in_the_backward_and_only_in_the_thread_that_asked(grafted: GraftedBase) -> None:
    counter, adapter = _Counter(grafted.model), _adapter(grafted)
    num_layers = len(decoder_layers(grafted.model))
    assert num_layers == 2
    try:
        _gradients(grafted, adapter, recompute=False)
        assert len(counter.seen) == num_layers
        counter.seen.clear()
        _gradients(grafted, adapter, recompute=True)
        assert len(counter.seen) == 2 * num_layers
        counter.seen.clear()
        with recomputed_layers(grafted.model):
            other = threading.Thread(target=lambda: _gradients(grafted, adapter, recompute=False))
            other.start()
            other.join()
        assert len(counter.seen) == num_layers
    finally:
        counter.remove()


def test_no_switch_of_the_model_is_touched(grafted: GraftedBase) -> None:
    before = {
        name: (m.training, getattr(m, "gradient_checkpointing", None)) for name, m in grafted.model.named_modules()
    }
    with recomputed_layers(grafted.model):
        during = {
            name: (m.training, getattr(m, "gradient_checkpointing", None)) for name, m in grafted.model.named_modules()
        }
    assert before == during
