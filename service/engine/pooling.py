"""A prompt as one vector: the mean of the base's last hidden states, of length one. Knows no queue and no client.

The sum is taken in float32, chunk by chunk on the grid of the prompt, so its bits do not depend on the crowd.
The inner model is watched by one hook that is quiet unless the calling thread is `watching`: the trainer runs
the same modules, and a hook that came and went would change a dictionary under its feet.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from service.engine.base_model import BaseModel

_current = threading.local()
_hooked = "_rootstock_watched"


class HiddenStates:
    """What the inner model returned to this thread: `last` is [tokens, hidden], normalised as the head reads it."""

    last: torch.Tensor | None = None


@contextmanager
def watching() -> Iterator[HiddenStates]:
    """Forwards of this thread inside the block leave their last hidden states in the value."""
    _current.seen = seen = HiddenStates()
    try:
        yield seen
    finally:
        _current.seen = None


def watch_hidden_states(base: BaseModel) -> int | None:
    """Prepare `watching` for this base. Returns the size of a hidden state, or None when none can be seen."""
    inner = base.model.base_model
    if inner is base.model:
        return None
    if not hasattr(inner, _hooked):
        inner.register_forward_hook(_notice)
        setattr(inner, _hooked, True)
    tokens = torch.zeros(1, 2, dtype=torch.long, device=base.device)
    with torch.inference_mode(), watching() as seen:
        base.model(input_ids=tokens, use_cache=False)
    return None if seen.last is None or seen.last.shape[0] != 2 else seen.last.shape[1]


def add_chunk(total: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    """The running sum with a chunk's rows; hidden: [tokens, hidden] -> [hidden], float32."""
    chunk = hidden.float().sum(dim=0)
    return chunk if total is None else total + chunk


def embedding(total: torch.Tensor, num_tokens: int) -> NDArray[np.float32]:
    """[hidden]: the mean, divided by its length."""
    mean = (total / num_tokens).cpu().numpy().astype(np.float64)
    normalised: NDArray[np.float32] = (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)
    return normalised


def _notice(module: nn.Module, args: Any, output: Any) -> None:
    seen: HiddenStates | None = getattr(_current, "seen", None)
    if seen is not None:
        states: torch.Tensor = output[0]
        seen.last = states[0]
