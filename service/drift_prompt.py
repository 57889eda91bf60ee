"""What of a prompt the watch for drift looks at, and what a reference shares with it. Knows no engine, no statistic.

Whoever makes a reference uses the same two functions: statistics of prompts that were cut or embedded otherwise say
nothing about these.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

MAX_PROMPT_TOKENS = 512
"""Of one prompt; so much is embedded, so one probe costs no more than that, however long prompts are."""

POOLING = "mean of the last hidden states, length one"
"""As `service.engine.pooling` does it, with the adapter off."""


PROMPT_SIGNALS = ("prompt_embedding", "prompt_length", "prompt_nll")
"""What of a prompt is compared with the prompts of the training."""


class Embedding(Protocol):
    """As much of a base as its embeddings depend on."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def quantization(self) -> str: ...


def probe_tokens(prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The last `MAX_PROMPT_TOKENS`: prompts of one application begin alike, and differ at the end."""
    return prompt[-MAX_PROMPT_TOKENS:]


def drift_basis(base: Embedding) -> str:
    """Names how prompts become vectors: base, quantization, pooling, cut. Another basis, another space."""
    parts = (base.fingerprint, str(base.quantization), POOLING, f"last {MAX_PROMPT_TOKENS} tokens")
    return "sha256:" + hashlib.sha256("\0".join(parts).encode()).hexdigest()
