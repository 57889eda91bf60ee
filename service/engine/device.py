"""What the engine asks of its device: to go before training, and whether it is still there. Knows no model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def decoding_stream(device: torch.device) -> AbstractContextManager[object]:
    """On CUDA a stream that goes before training's; on CPU the kernel arbitrates by thread priority."""
    if device.type != "cuda":
        return nullcontext()
    torch.cuda.synchronize(device)
    return torch.cuda.stream(torch.cuda.Stream(device, priority=-1))  # type: ignore[no-untyped-call]


def is_lost(device: torch.device) -> bool:
    """After some CUDA errors no call of this process succeeds any more: only a new process helps."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
