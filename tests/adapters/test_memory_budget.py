"""A step that runs out of memory goes on with less, and learns the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from adapters.memory_budget import MemoryBudget
from adapters.trainer import Trainer
from tests.adapters.conftest import GraftedBase, TemplateCodec
from tests.adapters.corpora import CONFIG, bits, chats, make_trainer, pairs, run


def _trainer(base: GraftedBase, codec: TemplateCodec, **config: object) -> Trainer:
    config = {"max_slice_tokens": 4096, "batch_size": 6, **config}
    return make_trainer(base, chats(codec), chats(codec, 6, seed=1), replace(CONFIG, **config))  # type: ignore[arg-type]


def _too_small_for(trainer: Trainer, max_tokens: int, *, in_backward: bool = False) -> Callable[[], None]:
    """Let the device have room for packs of `max_tokens`, or for any once layers are recomputed; call it to end that.

    In a backward the room is found wanting at the lowest layer, when the others have added to their gradients.
    """
    memory = trainer.memory
    sizes = [0]

    def enter(module: torch.nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        sizes[0] = args[0].numel()
        if not in_backward:
            check()

    def check(*_: object) -> None:
        if sizes[0] > max_tokens and not memory.recompute_layers:
            raise torch.OutOfMemoryError("no room")

    embeddings: torch.nn.Module = trainer.loss.forward.model.model.embed_tokens  # type: ignore[union-attr,assignment]
    hooks = [embeddings.register_forward_hook(enter)]
    if in_backward:
        hooks.append(trainer.adapter.a[trainer.adapter.names[0]].register_hook(check))

    def free() -> None:
        for hook in hooks:
            hook.remove()

    return free


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_step_out_of_memory_takes_smaller_packs_and_learns_the_same(
    grafted: GraftedBase, codec: TemplateCodec, in_backward: bool
) -> None:
    """A backward that fails half-way has already added to the gradients: they must not be counted twice."""
    easy, tight = _trainer(grafted, codec), _trainer(grafted, codec)
    run(easy, 3)
    free = _too_small_for(tight, 120, in_backward=in_backward)
    try:
        for expected in easy.history:
            result = tight.step()
            assert result.loss == pytest.approx(expected.loss, rel=1e-5)
            assert result.accuracy == expected.accuracy
    finally:
        free()
    assert tight.memory.max_slice_tokens <= 128 < easy.memory.max_slice_tokens
    assert not tight.memory.recompute_layers
    assert "ran out of memory at step 1: packs are now of at most 2048 tokens" in tight.incidents[0]
    for one, other in zip(easy.adapter.parameters(), tight.adapter.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_gradient_of_a_step_cut_smaller_is_the_gradient_of_the_whole(
    grafted: GraftedBase, codec: TemplateCodec
) -> None:
    whole, cut = _trainer(grafted, codec), _trainer(grafted, codec)
    batch = whole.cursor.batch(0)
    whole._accumulate(batch, lambda: None)
    free = _too_small_for(cut, 100)
    try:
        cut._within_memory(cut.objective.longest(batch), lambda: cut._accumulate(batch, lambda: None))
    finally:
        free()
    assert len(cut.objective.packs(batch)) > len(whole.objective.packs(batch)) == 1
    for one, other in zip(whole.adapter.parameters(), cut.adapter.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_where_one_example_is_too_large_layers_are_recomputed(grafted: GraftedBase, codec: TemplateCodec) -> None:
    easy, tight = _trainer(grafted, codec), _trainer(grafted, codec)
    expected = easy.step()
    free = _too_small_for(tight, 8)
    try:
        result = tight.step()
    finally:
        free()
    assert tight.memory.recompute_layers
    assert tight.incidents[-1].endswith("activations are now recomputed layer by layer.")
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)


def test_an_evaluation_out_of_memory_takes_smaller_packs_too(grafted: GraftedBase, codec: TemplateCodec) -> None:
    easy, tight = _trainer(grafted, codec), _trainer(grafted, codec)
    expected = easy.evaluate()
    free = _too_small_for(tight, 100)
    try:
        assert tight.evaluate().loss == pytest.approx(expected.loss, rel=1e-5)
    finally:
        free()
    assert tight.incidents


def test_pairs_out_of_memory_stay_together(grafted: GraftedBase, codec: TemplateCodec) -> None:
    config = replace(CONFIG, beta=0.1, max_slice_tokens=4096, batch_size=6)
    easy, tight = (make_trainer(grafted, pairs(codec), pairs(codec, 6, seed=1), config) for _ in range(2))
    run(easy, 2)
    free = _too_small_for(tight, 150)
    try:
        for expected in easy.history:
            assert tight.step().loss == pytest.approx(expected.loss, rel=1e-5)
    finally:
        free()
    assert tight.incidents


def test_what_cannot_fit_at_all_is_raised_and_leaves_no_trace(grafted: GraftedBase, codec: TemplateCodec) -> None:
    trainer = _trainer(grafted, codec, recompute_layers=False)
    before = bits(trainer)
    free = _too_small_for(trainer, 8)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            trainer.step()
    finally:
        free()
    assert trainer.steps_done == 0
    assert bits(trainer) == before
    assert all(p.grad is None for p in trainer.adapter.parameters())


def test_a_run_resumes_with_the_memory_it_had_come_down_to(grafted: GraftedBase, codec: TemplateCodec) -> None:
    straight = _trainer(grafted, codec)
    free = _too_small_for(straight, 100)
    straight.step()
    free()  # somebody else's memory is free again, but a run never grows back
    resumed = _trainer(grafted, codec)
    resumed.load_state_dict(straight.state_dict())
    run(straight, 3)
    run(resumed, 3)
    assert bits(resumed) == bits(straight)


def test_layers_are_recomputed_from_the_start_when_asked(grafted: GraftedBase, codec: TemplateCodec) -> None:
    plain, asked = _trainer(grafted, codec), _trainer(grafted, codec, recompute_layers=True)
    assert asked.memory.recompute_layers
    run(plain, 3)
    run(asked, 3)
    assert bits(asked) == bits(plain)


def test_packs_are_halved_down_to_the_longest_example_and_then_layers_are_recomputed() -> None:
    memory = MemoryBudget(1000)
    said = [memory.tighten(300) for _ in range(4)]
    assert (memory.max_slice_tokens, memory.recompute_layers) == (300, True)
    assert said == [
        "packs are now of at most 500 tokens",
        "packs are now of at most 300 tokens",
        "activations are now recomputed layer by layer",
        None,
    ]
    assert MemoryBudget(100, may_recompute=False).tighten(300) is None
