"""Holding an adapter near its base: the divergence against the formula spelled out, and what it is good for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adapters.lora import routing
from adapters.recipe import TrainConfig
from adapters.supervised import MAX_KEPT, divergence, kept_mask
from adapters.trainable import TrainRouting
from adapters.trainer import Trainer
from tests.adapters.conftest import GraftedBase, TemplateCodec
from tests.adapters.corpora import CONFIG, bits, chats, make_trainer, run

HELD = replace(CONFIG, kl_to_base=0.7)


def _trainer(base: GraftedBase, codec: TemplateCodec, config: TrainConfig = HELD) -> Trainer:
    return make_trainer(base, chats(codec), chats(codec, 6, seed=1), config)


def _slow_step(base: GraftedBase, trainer: Trainer, batch: list[int], weight: float) -> tuple[torch.Tensor, float]:
    """Loss with its graph, and mean divergence, one sequence and one token at a time."""
    nats, num_learned = torch.zeros(()), 0
    divergences = []
    for index in batch:
        tokens, learned = trainer.train.sequence(index)
        with routing(TrainRouting(trainer.adapter)):
            here = base.model(input_ids=tokens[None].long(), use_cache=False).logits[0].log_softmax(-1)
        with torch.no_grad():
            there = base.model(input_ids=tokens[None].long(), use_cache=False).logits[0].log_softmax(-1)
        for position in range(1, len(tokens)):
            if learned[position]:
                nats = nats - here[position - 1, int(tokens[position])]
                num_learned += 1
            elif kept_mask(learned)[position]:
                p, q = here[position - 1], there[position - 1]
                divergences.append((p.exp() * (p - q)).sum())
    kl = torch.stack(divergences).mean()
    return nats / num_learned + weight * kl, kl.item()


@pytest.mark.parametrize("max_slice_tokens", [1, 4096])
def test_loss_and_gradients_are_those_of_the_formula(
    grafted: GraftedBase, codec: TemplateCodec, max_slice_tokens: int
) -> None:
    trainer = _trainer(grafted, codec, replace(HELD, max_slice_tokens=max_slice_tokens))
    run(trainer, 3)  # away from the start, where there is no divergence yet
    batch = trainer.cursor.batch(3)
    loss, kl = _slow_step(grafted, trainer, batch, 0.7)
    expected = torch.autograd.grad(loss, trainer.adapter.parameters())
    means = trainer._accumulate(batch, lambda: None)
    assert kl > 1e-3
    assert means["kl"] == pytest.approx(kl, rel=1e-4)
    for gradient, parameter in zip(expected, trainer.adapter.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_an_adapter_that_does_nothing_yet_has_no_divergence(grafted: GraftedBase, codec: TemplateCodec) -> None:
    assert _trainer(grafted, codec).step().kl == pytest.approx(0.0, abs=1e-7)


@pytest.mark.slow
def test_a_held_adapter_moves_the_prompts_less_and_learns_all_the_same(
    grafted: GraftedBase, codec: TemplateCodec
) -> None:
    held, free = _trainer(grafted, codec, replace(HELD, kl_to_base=10.0)), _trainer(grafted, codec, CONFIG)
    run(held, 12)
    run(free, 12)
    _, moved_held = _slow_step(grafted, held, list(range(8)), 1.0)
    _, moved_free = _slow_step(grafted, free, list(range(8)), 1.0)
    assert moved_held < 0.7 * moved_free
    assert held.history[-1].loss < 0.8 * held.history[0].loss


def test_a_price_of_zero_is_the_plain_run_to_the_last_bit(grafted: GraftedBase, codec: TemplateCodec) -> None:
    zero, plain = _trainer(grafted, codec, replace(HELD, kl_to_base=0.0)), _trainer(grafted, codec, CONFIG)
    run(zero, 2)
    run(plain, 2)
    assert bits(zero) == bits(plain)
    assert zero.history[0].kl is None


def test_kept_tokens_are_spread_over_the_prompt_and_never_learned_ones() -> None:
    learned = torch.zeros(200, dtype=torch.bool)
    learned[120:150] = True
    mask = kept_mask(learned)
    assert int(mask.sum()) == MAX_KEPT
    assert not (mask & learned).any()
    assert not mask[0]
    assert mask[1] and mask[199]
    short = kept_mask(torch.tensor([False, False, True]))
    assert short.tolist() == [False, True, False]
    assert not kept_mask(torch.tensor([False, True, True])).any()


def test_divergence_is_from_the_adapter_to_the_base() -> None:
    one, other = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(1))
    p, q = one.softmax(-1), other.softmax(-1)
    assert divergence(one, other).item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert divergence(one, other).item() != pytest.approx(divergence(other, one).item(), rel=1e-2)
