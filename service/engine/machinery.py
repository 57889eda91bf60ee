"""What decodes and what a crash may leave broken: cache, slots, scheduler, runner. Knows no answers and no clients.

A restart closes it and builds another around the same base and the same adapters in host memory.
"""

from __future__ import annotations

from collections.abc import Callable

from adapters.host_cache import HostCache
from adapters.slots import AdapterSlots
from service.engine.base_model import BaseModel
from service.engine.engine_config import EngineConfig
from service.engine.kernel_forward import kernel_forward
from service.engine.kv_cache import KvCache, block_tokens
from service.engine.observation import EngineObserver
from service.engine.plan import Plan, Work
from service.engine.prefix_cache import PrefixCache
from service.engine.residency import Residency
from service.engine.runner import Runner, probe_layers
from service.engine.scheduler import Admission, Scheduler
from service.engine.sequence import GenerationRequest, SamplingParams, Sequence

_SELF_CHECK = GenerationRequest("_self_check", (0,), SamplingParams(max_tokens=1, temperature=0.0), "_self_check")


class Machinery:
    """`scheduler` plans, `residency` holds, `runner` computes."""

    def __init__(
        self,
        base: BaseModel,
        config: EngineConfig,
        host: HostCache,
        observer: EngineObserver,
        on_preempt: Callable[[Sequence], None],
    ) -> None:
        cache, slots = _cache(base, config), _slots(base, config, host, observer)
        shared = config.prefix_cache == "shared"
        prefixes = None if config.prefix_cache == "off" else PrefixCache(cache, shared=shared)
        self.residency = Residency(cache, slots, prefixes)
        self.scheduler = Scheduler(
            self.residency,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefill_chunk=config.prefill_chunk,
            on_preempt=on_preempt,
        )
        kernels = kernel_forward(base, self.residency, config.max_num_seqs, config.cuda_graphs)
        self.runner = Runner(base, self.residency, kernels)
        self._prefetched_at = (0, 0)

    def prefetch(self, num_wakes: int) -> None:
        """Adapters of the next waiting requests come nearer while this step is computed. `num_wakes` goes up when an
        adapter has come."""
        slots, seen = self.residency.slots, (self.scheduler.waiting.version, num_wakes)
        if seen != self._prefetched_at or slots.may_fetch_more:
            self._prefetched_at = seen
            slots.prefetch(self.scheduler.upcoming(2 * slots.num_slots))

    def self_check(self) -> bool:
        """One token, past the queue: can this still compute? Raises what the forward raises; False if none was made."""
        sequence = Sequence(_SELF_CHECK, max_tokens=1)
        if self.residency.acquire(sequence) is not Admission.STARTED:
            return False  # others hold all of the cache; their next step shows the same
        try:
            self.runner.run(Plan(prefills=[Work(sequence, 1, is_prefill=True, samples=True)]), {sequence: 0})
        finally:
            self.residency.release(sequence)
        return True

    def forget_tenant(self, tenant: str) -> None:
        """Of a tenant that has no sequence any more nothing is left."""
        self.scheduler.counters.forget(tenant)
        if self.residency.prefixes is not None:
            self.residency.prefixes.drop_tenant(tenant)

    def close(self) -> None:
        """Give the memory back. Nothing can be computed with it any more."""
        self.residency.close()


def _cache(base: BaseModel, config: EngineConfig) -> KvCache:
    return KvCache(
        probe_layers(base),
        max_bytes=config.kv_cache_bytes,
        max_model_len=base.max_model_len,
        dtype=base.dtype,
        device=base.device,
        block=block_tokens(config.prefill_chunk),
    )


def _slots(base: BaseModel, config: EngineConfig, host: HostCache, observer: EngineObserver) -> AdapterSlots:
    return AdapterSlots(
        base.lora_sites.values(),
        num_slots=config.max_lora_slots,
        max_rank=config.max_lora_rank,
        dtype=base.dtype,
        device=base.device,
        host=host,
        observer=observer,
    )
