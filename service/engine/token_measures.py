"""How surprising each sampled token was and how open its choice: of the model's own distribution, in nats.

Knows logits and chosen tokens, no sequences. On CPU one compiled pass reads each row and writes nothing: a
softmax of whole rows would be felt in every decode step.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from adapters.jit import exp_of_negative, kernel

_LOWEST = -87.0
"""exp of less is no float32: such a token counts as this unlikely, and a forbidden one (-inf) makes no NaN."""


def token_measures(logits: torch.Tensor, chosen: torch.Tensor) -> list[tuple[float, float]]:
    """(-log p(chosen), entropy of p) of each row, p = softmax(logits); logits: float32 [rows, vocabulary].

    With d = logits - max and s = sum exp(d): -log p = log s - d, and the entropy is log s - sum(exp(d) d) / s.
    """
    if logits.device.type == "cpu":
        found = np.empty((2, logits.shape[0]), np.float32)
        highest = logits.amax(dim=-1)
        measure_rows(logits.contiguous().numpy(), highest.numpy(), chosen.numpy(), found[0], found[1], _LOWEST)
        return list(zip(*found.tolist(), strict=True))
    return list(zip(*torch_measures(logits, chosen).tolist(), strict=True))


def torch_measures(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The same in torch's operations, for any device: float32 [2, rows]."""
    d = (logits - logits.amax(dim=-1, keepdim=True)).clamp_(min=_LOWEST)
    weights = d.exp()
    total = weights.sum(dim=-1)
    log_total = total.log()
    own = d.gather(1, chosen[:, None]).squeeze(1)
    return torch.stack((log_total - own, log_total - torch.linalg.vecdot(weights, d) / total))


@kernel
def measure_rows(logits: Any, highest: Any, chosen: Any, nll: Any, entropy: Any, lowest: float) -> None:
    """logits: [rows, vocabulary], highest, chosen: [rows]; writes nll: [rows] and entropy: [rows]."""
    for row in numba.prange(logits.shape[0]):
        x, top = logits[row], highest[row]
        total, moment = np.float32(0), np.float32(0)
        for c in range(x.shape[0]):
            d = max(x[c] - top, np.float32(lowest))
            weight = exp_of_negative(d)
            total += weight
            moment += weight * d
        log_total = np.log(total)
        nll[row] = log_total - max(x[chosen[row]] - top, np.float32(lowest))
        entropy[row] = log_total - moment / total


def compile_kernels() -> None:
    """Now rather than in somebody's request; a few seconds unless they were kept from the last time."""
    token_measures(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
