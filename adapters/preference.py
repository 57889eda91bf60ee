"""Learning from pairs: direct preference optimisation (DPO; Rafailov et al., arXiv 2305.18290). Knows no optimizer.

    loss = -log sigmoid(beta * ((log p(chosen) - log p(rejected)) - (the same under the reference)))

log p is summed over the answer's tokens. The reference is the model as the run found it: the base, or the adapter that
the run continues. Its log-probabilities are taken once, before the first step.
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


class Preference:
    """An `Objective` over a corpus of pairs: sequence 2i is preferred to sequence 2i + 1.

    Measures `loss`, `accuracy` (the share of pairs in which the preferred answer gained more than the other) and
    `margin` (by how much: beta * the difference of the gains, in nats), all as means over pairs.
    """

    def __init__(self, corpus: Corpus, forward: PackedForward, beta: float) -> None:
        assert len(corpus) % 2 == 0
        self.corpus = corpus
        self.beta = beta
        self._forward = forward
        self._lengths: list[int] = corpus.lengths.tolist()
        self._learned = corpus.num_learned
        self._reference: torch.Tensor | None = None
        """log p(preferred) - log p(other) at the start: float32 [pairs]."""

    def __len__(self) -> int:
        return len(self.corpus) // 2

    def packs(self, batch: list[int]) -> list[list[int]]:
        slices = self._forward.packs([2 * self._longer(pair) for pair in batch])
        return [[batch[position] for position in part] for part in slices]

    def num_tokens(self, batch: list[int]) -> int:
        return sum(self._lengths[2 * pair] + self._lengths[2 * pair + 1] for pair in batch)

    def longest(self, batch: list[int]) -> int:
        return max(2 * self._longer(pair) for pair in batch)

    def divisors(self, batch: list[int]) -> Mapping[str, int]:
        return dict.fromkeys(("loss", "accuracy", "margin"), len(batch))

    @torch.no_grad()
    def prepare(self, start: Routing, between_packs: Callable[[], None]) -> None:
        if self._reference is not None:
            return
        found = torch.empty(len(self))
        for pack in self.packs(list(range(len(self)))):
            found[pack] = self._gap(pack, start).cpu()
            between_packs()
        self._reference = found

    def state_dict(self) -> dict[str, Any]:
        return {"reference": None if self._reference is None else self._reference.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reference = state["reference"]

    def __call__(self, pack: list[int], divisors: Mapping[str, int], route: Routing | None) -> PackResult:
        assert self._reference is not None, "prepare() comes first"
        reference = self._reference[pack].to(self._forward.device)
        margins = self.beta * (self._gap(pack, route) - reference)
        loss = functional.softplus(-margins).sum()
        sums = {"loss": loss, "accuracy": (margins.detach() > 0).sum(), "margin": margins.sum()}
        return PackResult(loss / divisors["loss"], sums)

    def _gap(self, pack: list[int], route: Routing | None) -> torch.Tensor:
        """log p(preferred) - log p(other) of each pair: float32 [pairs]."""
        indices = [index for pair in pack for index in (2 * pair, 2 * pair + 1)]
        logits, labels = self._forward([self.corpus.sequence(index) for index in indices], route)
        log_p = -functional.cross_entropy(logits.float(), labels, reduction="none")
        owners = torch.repeat_interleave(self._learned[indices]).to(log_p.device)
        per_answer = log_p.new_zeros(len(indices)).index_add(0, owners, log_p).view(-1, 2)
        return per_answer[:, 0] - per_answer[:, 1]

    def _longer(self, pair: int) -> int:
        return max(self._lengths[2 * pair], self._lengths[2 * pair + 1])
