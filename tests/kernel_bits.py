"""What the CPU's compiled kernels compute, as one digest; knows neither references nor tolerances.

`python -m tests.kernel_bits` prints the kernels' number of threads and the digest: a process has one number.
"""

from __future__ import annotations

import hashlib

import numba
import torch

from adapters.lora import Chunk, Chunks, RowSlots, _add_compiled
from tests.adapters.lora_mixes import random_table, rows_of
from tests.service.engine.decode_mixes import SHAPES, Rows


def digest() -> str:
    """Over prompts' and single rows' LoRA and over a decode step's attention, in both dtypes."""
    cpu = torch.device("cpu")
    found = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16):
        table, _ = random_table(600, [4, 20, 8, 16], dtype, cpu, table_rank=24)
        slots: list[int | None] = [0, 1, *[2] * 20, None, 3]
        x, y = rows_of(13 + len(slots), 600, dtype, cpu)
        _add_compiled(table, Chunks([Chunk(0, 6, 1), Chunk(6, 13, 3)]), RowSlots(slots, 13), x, y)
        attended = [Rows(shape, dtype, cpu).reference(compiled=True) for shape in SHAPES.values()]
        for result in (y, *attended):
            found.update(result.float().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    print(numba.get_num_threads(), digest())
