"""How surprising a prompt is to the base: the negative log-probability of its tokens. Knows no queue and no client.

What the layers left is sent through what comes behind them in the base's own forward (the head, and whatever scales or
caps its logits) a few positions at a time: nobody holds the logits of a whole prompt. The positions lie on the grid on
which prompts are computed, so the sum's bits do not depend on the crowd.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from adapters.lora import routing
from service.engine.base_model import BaseModel
from service.engine.pooling import watching

POSITIONS = 64
"""Whose logits are held at a time."""
_CHECKED = 4
_TOLERANCE = 0.02
"""Of the check's largest logit: bfloat16 products of another shape may round otherwise."""


class PromptNll:
    """Sums over the chunks of a prompt."""

    def __init__(self, behind_layers: nn.Module) -> None:
        self._behind_layers = behind_layers

    def add_chunk(self, total: torch.Tensor | None, hidden: torch.Tensor, next_tokens: list[int]) -> torch.Tensor:
        """The running sum with this chunk; hidden: [positions, hidden], the first of which have a next token in the
        prompt -> float64 scalar."""
        device = hidden.device
        total = torch.zeros((), dtype=torch.float64, device=device) if total is None else total
        targets = torch.tensor(next_tokens, dtype=torch.int64, device=device)
        for start in range(0, len(next_tokens), POSITIONS):
            asked = targets[start : start + POSITIONS]
            logits = _logits(self._behind_layers, hidden[start : start + len(asked)])
            total = total + functional.cross_entropy(logits.float(), asked, reduction="none").double().sum()
        return total


def prompt_nll(base: BaseModel) -> PromptNll | None:
    """None for a base whose logits are made of something else than the hidden states that it shows."""
    tokens = torch.arange(_CHECKED, device=base.device)[None] % base.vocab_size  # a padding token may be all zeros
    with torch.inference_mode(), watching() as seen:
        whole = base.model(input_ids=tokens, use_cache=False).logits[0]
        if seen.last is None or seen.last.shape[0] != _CHECKED:
            return None
        behind_layers = _without_layers(base.model)
        try:
            found = _logits(behind_layers, seen.last)
        except Exception:  # a forward may ask of its layers whatever it likes
            return None
    if found.shape != whole.shape or float((found - whole).abs().max()) > _TOLERANCE * float(whole.abs().max()):
        return None
    return PromptNll(behind_layers)


class _Given(nn.Module):
    """Stands where the layers stood: the hidden states are what was put in."""

    def forward(self, *_: object, inputs_embeds: torch.Tensor, **__: object) -> _Left:
        return _Left(inputs_embeds)


class _Left:
    """What layers leave, whatever else this kind of model asks for: caches, attentions, a router's choices."""

    def __init__(self, states: torch.Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _without_layers(model: PreTrainedModel) -> nn.Module:
    """A second view of the model that shares its head and whatever else it has, but not its layers."""
    view = copy.copy(model)
    view._modules = {**model._modules, model.base_model_prefix: _Given()}
    return view


def _logits(behind_layers: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """[positions, hidden] -> [positions, vocabulary], by the base alone."""
    with torch.inference_mode(), routing(None):
        logits: torch.Tensor = behind_layers(inputs_embeds=hidden[None], use_cache=False).logits[0]
    return logits
