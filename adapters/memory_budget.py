"""How much of a step lies on the device at once: it shrinks when memory runs out, and never grows. Knows no tensors."""

from __future__ import annotations


class MemoryBudget:
    """`max_slice_tokens` bounds a pack; `recompute_layers` trades a third more computing for most of the activations.

    `may_recompute` False keeps layers from ever being recomputed, whatever that costs.
    """

    def __init__(self, max_slice_tokens: int, *, recompute_layers: bool = False, may_recompute: bool = True) -> None:
        self.max_slice_tokens = max_slice_tokens
        self.recompute_layers = recompute_layers
        self.may_recompute = may_recompute

    def tighten(self, longest: int) -> str | None:
        """Take the next smaller step and say which; None when nothing is left to give.

        Packs are halved first, which costs little. They cannot become smaller than the `longest` example (in tokens),
        and then only recomputing helps.
        """
        if self.max_slice_tokens > longest:
            self.max_slice_tokens = max(longest, self.max_slice_tokens // 2)
            return f"packs are now of at most {self.max_slice_tokens} tokens"
        if self.may_recompute and not self.recompute_layers:
            self.recompute_layers = True
            return "activations are now recomputed layer by layer"
        return None

    def state_dict(self) -> dict[str, int | bool]:
        return {"max_slice_tokens": self.max_slice_tokens, "recompute_layers": self.recompute_layers}

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        self.max_slice_tokens = int(state["max_slice_tokens"])
        self.recompute_layers = bool(state["recompute_layers"])
