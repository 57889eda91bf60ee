"""Compiles every kernel for an H100-class device, which needs no device; prints name and shared memory in bytes.

Run as a process of its own: the tests' process has Triton's interpreter switched on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adapters import lora_triton
from service.engine import decode_triton

TARGET = GPUTarget("cuda", 90, 32)
UNALIGNED = {"rows", "tiles_stride", "k_dim_stride", "v_dim_stride", "q_dim_stride", "scale", "softcap"}
TYPES = {"ranks": "*i64", "tiles": "*i64", "first": "*i64", "capacity": "*i64", "lengths": "*i64", "h": "*fp32"} | {
    "sums": "*fp32", "maxima": "*fp32", "norms": "*fp32", "scale": "fp32", "softcap": "fp32",
}  # fmt: skip
TENSORS = {"x", "a", "y", "b", "q", "k", "v", "keys", "values", "out"}


def compile_kernel(kernel: Any, element: str, constants: Mapping[str, Any]) -> None:
    """As a launch would, with everything aligned to 16 that usually is."""
    names = kernel.arg_names
    signature = {n: TYPES.get(n, f"*{element}" if n in TENSORS else "i32") for n in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [i for i, n in enumerate(names) if n not in constants and n not in UNALIGNED]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=TARGET)
    assert len(compiled.asm["cubin"]) > 0
    print(kernel.__name__, element, compiled.metadata.shared)


def main() -> None:
    """Sizes of Llama 3.1 8B."""
    assert isinstance(lora_triton._shrink, triton.JITFunction), "the interpreter is on"
    torch.set_num_threads(1)
    lora = {"PARTS": 3, "TILE": 16, "UPCAST": False}
    sizes = {"KEY_DIM": 128, "VALUE_DIM": 128}
    shared = {"WINDOW": 64, "MAX_SPLITS": 16, "VALUE_DIM": 128, "BLOCK_VALUE_DIM": 128}
    compile_kernel(lora_triton._shrink, "bf16", lora | {"RANK_BLOCKS": 1, "PIECE": 1024, "BLOCK_IN": 128})
    bank = {"FIRST_PART": 1, "BANK_PARTS": 2, "OUT_BLOCKS": 8, "SPLITS": 4, "BLOCK_OUT": 128}
    compile_kernel(lora_triton._expand, "bf16", lora | bank)
    compile_kernel(decode_triton._store, "bf16", sizes | {"HEADS": 8, "BLOCK_KEY": 128, "BLOCK_VALUE": 128})
    attend = sizes | shared | {"KV_HEADS": 8, "GROUP": 4, "HAS_SOFTCAP": True, "BLOCK_GROUP": 16, "BLOCK_KEY_DIM": 128}
    for element, block in (("bf16", 64), ("fp32", 32)):
        compile_kernel(decode_triton._attend_split, element, attend | {"BLOCK_KEYS": block, "UPCAST": False})
    compile_kernel(decode_triton._merge, "bf16", shared | {"HEADS": 32})


if __name__ == "__main__":
    main()
