"""A plan -> tensors -> logits -> tokens: the one forward of a step. Knows no queue and no client."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from adapters import jit, lora_cpu
from adapters.lora import Chunk, Chunks, RowSlots, SlotRouting, routing
from service.engine import attention_cpu, token_measures
from service.engine.attention import ShapeProbe, attending
from service.engine.base_model import BaseModel
from service.engine.frozen_linear import decoding
from service.engine.kernel_forward import KernelForward
from service.engine.kv_cache import LayerShape
from service.engine.plan import Plan, Work
from service.engine.pooling import add_chunk, watching
from service.engine.prompt_nll import prompt_nll
from service.engine.residency import Residency
from service.engine.sampler import Sampled, Sampler
from service.engine.sequence import Sequence
from service.engine.step_attention import StepAttention
from service.engine.step_batch import StepBatch


def probe_layers(base: BaseModel) -> list[LayerShape]:
    """What each attention layer of the model stores, seen in a forward of two tokens."""
    probe = ShapeProbe({})
    tokens = torch.zeros(1, 2, dtype=torch.long, device=base.device)
    with torch.inference_mode(), attending(probe):
        base.model(input_ids=tokens, position_ids=torch.arange(2, device=base.device)[None], use_cache=False)
    if not probe.shapes or sorted(probe.shapes) != list(range(len(probe.shapes))):
        raise ValueError(f"{type(base.model).__name__} does not call attention once per layer: it cannot be served")
    return [probe.shapes[layer] for layer in sorted(probe.shapes)]


class Runner:
    """Computes plans on the base with every row's own adapter."""

    def __init__(self, base: BaseModel, residency: Residency, kernels: KernelForward | None = None) -> None:
        """`kernels` is the forward where there is a faster one than this class's own."""
        self._base = base
        self._kernels = kernels
        self._residency = residency
        self._sampler = Sampler()
        self._prompt_nll = prompt_nll(base)
        if base.device.type == "cpu" and base.dtype in jit.DTYPES:
            lora_cpu.compile_kernels(base.dtype)
            attention_cpu.compile_kernels(base.dtype)
            token_measures.compile_kernels()

    def run(self, plan: Plan, seeds: dict[Sequence, int]) -> list[tuple[Sequence, Sampled]]:
        """Compute the plan; returns a token for each sequence whose work samples.

        Tokens of prefill chunks stand first in the batch, then one token per decoding sequence, by adapter slot.
        """
        decodes = sorted(plan.decodes, key=self._decode_order)
        works = plan.prefills + decodes
        with watching() as hidden:
            forward = self._forward if self._kernels is None else self._kernels.logits
            logits = forward(plan.prefills, decodes)
        if hidden.last is not None:
            self._pool(plan.prefills, hidden.last)
        sampling = [work.sequence for work in works if work.samples]
        if not sampling:
            return []
        tokens = self._sampler.sample(logits, sampling, [seeds[s] for s in sampling])
        return list(zip(sampling, tokens, strict=True))

    def _pool(self, prefills: Many[Work], hidden: torch.Tensor) -> None:
        """Add the chunks of those that pool to their sums; hidden: [tokens of the step, hidden]."""
        start = 0
        for work in prefills:
            stop = start + work.num_tokens
            if work.sequence.needs_all_hidden:
                self._pool_chunk(work, hidden[start:stop])
            start = stop

    def _pool_chunk(self, work: Work, hidden: torch.Tensor) -> None:
        sequence, place = work.sequence, self._residency[work.sequence]
        with torch.inference_mode():
            place.hidden_sum = add_chunk(place.hidden_sum, hidden)
            if sequence.request.measure and self._prompt_nll is not None:
                first = sequence.num_computed + 1
                next_tokens = list(sequence.request.prompt_token_ids[first : first + work.num_tokens])
                place.nll_sum = self._prompt_nll.add_chunk(place.nll_sum, hidden, next_tokens)

    def _forward(self, prefills: Many[Work], decodes: Many[Work]) -> torch.Tensor:
        """Logits of the last token of every work that samples: [rows, vocabulary]."""
        batch = StepBatch.of(prefills, decodes, self._residency)
        start, num_tokens, device = batch.decode_start, len(batch.tokens), self._base.device
        attention = StepAttention(self._residency.cache, batch.chunks, start, batch.rows, batch.positions)
        slots = [(chunk, batch.slots[chunk.start]) for chunk in batch.chunks]
        chunks = Chunks([Chunk(chunk.start, chunk.stop, slot) for chunk, slot in slots if slot is not None])
        rows, head = RowSlots(batch.slots[start:], start), RowSlots(batch.sampled_slots)
        route = SlotRouting(self._residency.slots.tables, chunks, rows, head)
        with torch.inference_mode(), attending(attention), routing(route), decoding(num_tokens, start):
            output = self._base.model(
                input_ids=torch.tensor([batch.tokens], device=device),
                position_ids=torch.tensor([batch.positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(batch.logits_to_keep, device=device),
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _decode_order(self, work: Work) -> tuple[int, tuple[int, int, int]]:
        place = self._residency[work.sequence]
        return (-1 if place.slot is None else place.slot, place.row.order)
