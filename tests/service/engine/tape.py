"""What a CUDA graph does, on CPU: the operations of a forward are written down once, with the tensors they touched.

A replay computes the very same operations on the very same memory and runs no Python of the forward, so whatever the
forward took from anywhere but its buffers is stale, and a value fetched from the device is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")


class Tape(TorchDispatchMode):
    """Writes down every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in SYNCHRONIZING:
            raise RuntimeError(f"{name} waits for the device")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]))
        return result


class TapeRecording:
    """The written operations and the tensor with the result."""

    def __init__(self, step: Callable[[], torch.Tensor]) -> None:
        with Tape() as tape:
            self.output = step()
        self.calls = tape.calls
        self.replays = 0

    def replay(self) -> torch.Tensor:
        self.replays += 1
        with torch.inference_mode():
            for func, args, kwargs, outputs in self.calls:
                inputs = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
                again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
                for old, new in zip(outputs, again, strict=True):
                    if _memory(old) not in inputs:  # else a view, or computed in place
                        old.copy_(new)
        return self.output


class TapeRecorder:
    """Keeps its recordings for the test to look at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recordings: list[TapeRecording] = []
        self._monkeypatch = monkeypatch

    def __call__(self, step: Callable[[], torch.Tensor]) -> TapeRecording:
        with self._monkeypatch.context() as patch:  # transformers leaves out its checks of values then
            patch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
            self.recordings.append(TapeRecording(step))
        return self.recordings[-1]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
