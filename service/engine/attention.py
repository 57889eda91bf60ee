"""The attention function that transformers' models call here, registered as "rootstock".

What it does depends on the calling thread: a step of the engine (keys and values in the slab cache), a packed
batch (training and scoring, see `adapters.packing`), or neither (plain SDPA). Knows no scheduling and no LoRA.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from adapters.packing import JointPack, PackedBatch, current_pack
from service.engine.decode_attention import DecodeAttention
from service.engine.kv_cache import LayerShape
from service.engine.step_attention import StepAttention, softcapped

NAME = "rootstock"
SHORT = 256
"""Longest packed sequence, in tokens, that `_short_attention` takes."""
_current = threading.local()


@dataclass
class ShapeProbe:
    """Records what each attention layer stores, from one tiny forward: no model's config has to be understood."""

    shapes: dict[int, LayerShape]


@contextmanager
def attending(context: StepAttention | DecodeAttention | ShapeProbe) -> Iterator[None]:
    """Attention calls of this thread belong to `context` inside the block."""
    _current.context = context
    try:
        yield
    finally:
        _current.context = None


def register_attention() -> str:
    """Make "rootstock" known to transformers; returns the name for `attn_implementation`."""
    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, _attention_mask)
    return NAME


def _attention_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """No mask where the contexts know who may look where; SDPA's own elsewhere."""
    if getattr(_current, "context", None) is not None or current_pack() is not None:
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query: [batch, heads, tokens, dim], key and value: [batch, kv_heads, …] -> [batch, tokens, heads, dim]."""
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError("attention sinks and position biases are not supported")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    context: StepAttention | DecodeAttention | ShapeProbe | None = getattr(_current, "context", None)
    if isinstance(context, StepAttention | DecodeAttention):
        layer: int = module.layer_idx  # type: ignore[assignment]
        q, k, v = query[0], key[0], value[0]
        return context.attend(layer, q, k, v, scale, sliding_window, softcap)[None], None
    if isinstance(context, ShapeProbe):
        context.shapes[module.layer_idx] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])  # type: ignore[index]
    elif (pack := current_pack()) is not None:
        return _packed(pack, query, key, value, scale, sliding_window, softcap), None
    if softcap is not None:
        mask = _full_mask(query, key, attention_mask)
        rows = [softcapped(q, k, v, m, scale, softcap) for q, k, v, m in zip(query, key, value, mask, strict=True)]
        return torch.stack(rows).transpose(1, 2), None
    forward: Callable[..., tuple[torch.Tensor, None]] = sdpa_attention_forward
    return forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _full_mask(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[batch, query tokens, key tokens], True where a token may look."""
    if mask is not None:
        return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    q_len, k_len = query.shape[2], key.shape[2]
    causal = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device).tril(k_len - q_len)
    return causal.expand(query.shape[0], -1, -1)


def _packed(
    pack: PackedBatch | JointPack,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Isolated causal attention: query [1, heads, tokens, dim] -> [1, tokens, heads, dim]."""
    if isinstance(pack, JointPack):
        rows = zip(pack.parts, *(torch.split(x, pack.sizes, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([_packed(part, q, k, v, scale, window, softcap) for part, q, k, v in rows], dim=1)
    q, k, v = pack.pad(query), pack.pad(key), pack.pad(value)
    limited = window is not None and window < pack.width
    mask = None
    if softcap is not None or limited:
        at = torch.arange(pack.width, device=q.device)
        mask = at <= at[:, None]
        if window is not None:
            mask &= at > at[:, None] - window
    if softcap is not None and mask is not None:
        out = torch.stack([softcapped(*row, mask, scale, softcap) for row in zip(q, k, v, strict=True)])
    elif q.device.type == "cpu" and q.dtype == torch.bfloat16 and pack.width <= SHORT and torch.is_grad_enabled():
        out = _short_attention(q, k, v, mask, scale)
    else:
        gqa = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
    return pack.unpad(out)


def _short_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention spelled out, for training: the fused bfloat16 kernel on CPU takes six times as long for short rows."""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if mask is None:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q * scale) @ k.transpose(-1, -2)
    return scores.float().masked_fill(~mask, -torch.inf).softmax(dim=-1).to(q.dtype) @ v
