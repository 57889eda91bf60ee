"""How much memory a run took at its peak, as far as the machine can tell. Knows no run."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


class MemoryMeter:
    """From its making on. On CUDA it is the allocator's own peak, which other work on the device has a part in."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self._resident, self._highest = _resident_bytes()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    @property
    def peak_bytes(self) -> int | None:
        """Allocated on the CUDA device beyond what was there before. None on a CPU, which counts no tensors."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._before

    @property
    def resident_growth_bytes(self) -> int | None:
        """By how much the process has grown at most. None where it stood higher before, so that nobody can tell."""
        _, highest = _resident_bytes()
        return highest - self._resident if highest > self._highest else None


def _resident_bytes() -> tuple[int, int]:
    """Resident now, and at most since the process began; zeros where the system does not say."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return 0, 0
    return _kilobytes(text, "VmRSS") * 1024, _kilobytes(text, "VmHWM") * 1024


def _kilobytes(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return 0 if found is None else int(found[1])
