"""Learning answers: cross entropy on the learned tokens, optionally held near the base. Knows no optimizer.

With `kl_to_base` the adapter is also charged for moving the model's predictions on the prompts, which it is not asked
to change: loss + kl_to_base * mean KL(adapter || base), in nats, over up to `MAX_KEPT` evenly spaced prompt tokens of
each sequence. The base's own predictions come from a second forward over the same rows with no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from adapters.corpus import Corpus
from adapters.lora import Routing
from adapters.objective import PackResult
from adapters.packed_forward import PackedForward

MAX_KEPT = 32


class Supervised:
    """An `Objective` over the sequences of a corpus. Measures `loss`, `accuracy` and, with `kl_to_base`, `kl`."""

    def __init__(self, corpus: Corpus, forward: PackedForward, kl_to_base: float = 0.0) -> None:
        self.corpus = corpus
        self.kl_to_base = kl_to_base
        self._forward = forward
        self._lengths: list[int] = corpus.lengths.tolist()
        self._learned = corpus.num_learned.tolist()

    def __len__(self) -> int:
        return len(self.corpus)

    def packs(self, batch: list[int]) -> list[list[int]]:
        slices = self._forward.packs([self._lengths[index] for index in batch])
        return [[batch[position] for position in part] for part in slices]

    def num_tokens(self, batch: list[int]) -> int:
        return sum(self._lengths[index] for index in batch)

    def longest(self, batch: list[int]) -> int:
        return max(self._lengths[index] for index in batch)

    def divisors(self, batch: list[int]) -> Mapping[str, int]:
        learned = sum(self._learned[index] for index in batch)
        if not self.kl_to_base:
            return {"loss": learned, "accuracy": learned}
        kept = sum(int(kept_mask(self.corpus.sequence(index)[1]).sum()) for index in batch)
        return {"loss": learned, "accuracy": learned, "kl": max(1, kept)}

    def prepare(self, start: Routing, between_packs: Callable[[], None]) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def __call__(self, pack: list[int], divisors: Mapping[str, int], route: Routing | None) -> PackResult:
        rows = [self.corpus.sequence(index) for index in pack]
        if self.kl_to_base:
            return self._held_near_base(rows, divisors, route)
        logits, labels = self._forward(rows, route)
        logits = logits.float()
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        return PackResult(loss / divisors["loss"], {"loss": loss, "accuracy": _num_right(logits, labels)})

    def _held_near_base(
        self, rows: list[tuple[torch.Tensor, torch.Tensor]], divisors: Mapping[str, int], route: Routing | None
    ) -> PackResult:
        """One forward asks for the learned and the kept tokens; the base is asked for the kept ones alone."""
        kept = [kept_mask(learned) for _, learned in rows]
        both = [(tokens, learned | keep) for (tokens, learned), keep in zip(rows, kept, strict=True)]
        asked = torch.cat([mask[1:] for _, mask in both])
        is_kept = torch.cat([keep[1:] for keep in kept])[asked].to(self._forward.device)
        logits, labels = self._forward(both, route)
        answers, answer_labels = logits[~is_kept].float(), labels[~is_kept]
        loss = functional.cross_entropy(answers, answer_labels, reduction="sum")
        sums = {"loss": loss, "accuracy": _num_right(answers, answer_labels)}
        total = loss / divisors["loss"]
        if bool(is_kept.any()):
            with torch.no_grad():
                base, _ = self._forward([(tokens, keep) for (tokens, _), keep in zip(rows, kept, strict=True)], None)
            kl = divergence(logits[is_kept], base)
            sums["kl"] = kl
            total = total + self.kl_to_base * kl / divisors["kl"]
        else:
            sums["kl"] = loss.new_zeros(())
        return PackResult(total, sums)


def divergence(adapted: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Sum over rows of KL(adapted || base) in nats; both are logits [rows, vocabulary]."""
    here, there = adapted.float().log_softmax(dim=-1), base.float().log_softmax(dim=-1)
    return functional.kl_div(there, here, reduction="sum", log_target=True)


def kept_mask(learned: torch.Tensor) -> torch.Tensor:
    """Up to MAX_KEPT tokens that are neither learned nor first, evenly spaced; bool [length] like `learned`."""
    mask = torch.zeros_like(learned)
    free = (~learned[1:]).nonzero().squeeze(1) + 1
    count = min(MAX_KEPT, len(free))
    if count:
        mask[free[torch.linspace(0, len(free) - 1, count).round().long()]] = True
    return mask


def _num_right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits.detach().argmax(dim=-1) == labels).sum()
