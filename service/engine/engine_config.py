"""The engine's sizes, as it is given them. Knows neither Settings nor the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine; `service.config.Settings` documents each."""

    kv_cache_bytes: int
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    prefill_chunk: int = 128
    max_lora_slots: int = 32
    max_lora_rank: int = 64
    max_host_adapters: int = 256
    host_adapter_bytes: int = 4 << 30
    max_waiting: int = 1024
    cuda_graphs: bool = True
    prefix_cache: Literal["tenant", "shared", "off"] = "tenant"
