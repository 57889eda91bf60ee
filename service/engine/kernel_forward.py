"""The forward of a step on CUDA: decode steps by recorded graphs, steps with prompts eagerly by the same kernels.

Stands where the runner's own forward stands on CPU; knows no queue and no sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapters.lora import routing
from adapters.lora_tiles import AddLora, TiledRouting, plan_tiles, tiles_tensor
from service.engine.attention import attending
from service.engine.base_model import BaseModel
from service.engine.decode_attention import DecodeAttention, DecodeKernels, DecodeRows
from service.engine.decode_graphs import CudaRecorder, DecodeGraphs, DecodeRow, Recorder, StepInputs
from service.engine.kv_cache import LayerBuffer
from service.engine.plan import Work
from service.engine.residency import Residency
from service.engine.step_attention import StepAttention
from service.engine.step_batch import StepBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """What a step on CUDA is made of, besides the base's own layers."""

    decoding: DecodeKernels
    add_lora: AddLora


def kernel_forward(base: BaseModel, residency: Residency, max_num_seqs: int, cuda_graphs: bool) -> KernelForward | None:
    """None on CPU, and on CUDA where Triton does not work: there the runner's own forward serves."""
    if base.device.type != "cuda":
        return None
    try:
        kernels = triton_kernels(base.device)
    except Exception as error:  # not installed, or no C compiler for its launchers
        logger.warning("engine.no_triton", extra={"reason": f"{type(error).__name__}: {error}"})
        return None
    return KernelForward(base, residency, kernels, max_num_seqs, CudaRecorder(base.device) if cuda_graphs else None)


def triton_kernels(device: torch.device) -> Kernels:
    """The kernels, after a launch on a row of no tokens. Raises whatever keeps Triton from working there."""
    from adapters.lora_triton import add_lora
    from service.engine.decode_triton import TritonDecoding

    kernels = Kernels(TritonDecoding(), add_lora)
    line, nowhere = torch.zeros(1, 16, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    buffer, rows = LayerBuffer(line, line, num_kv_heads=1), DecodeRows(nowhere, nowhere, nowhere)
    kernels.decoding.store(rows, buffer, line[None], line[None])
    return kernels


class KernelForward:
    """Logits of a step, by kernels that need neither masks nor runs of neighbouring rows."""

    def __init__(
        self, base: BaseModel, residency: Residency, kernels: Kernels, max_num_seqs: int, record: Recorder | None
    ) -> None:
        self._base = base
        self._residency = residency
        self._kernels = kernels
        self._graphs = record and DecodeGraphs(
            self._decode,
            record,
            cache=residency.cache,
            tables=residency.slots.tables,
            max_num_seqs=max_num_seqs,
        )

    def logits(self, prefills: Sequence[Work], decodes: Sequence[Work]) -> torch.Tensor:
        """Of the last token of every work that samples, in order: [rows, vocabulary].

        Overwritten by the next call. Decodes of one adapter should be neighbours.
        """
        if prefills or not self._graphs:
            return self._eager(prefills, decodes)
        logits = self._graphs.run([self._decode_row(work) for work in decodes])
        if all(work.samples for work in decodes):
            return logits
        return logits[[index for index, work in enumerate(decodes) if work.samples]]

    def _decode_row(self, work: Work) -> DecodeRow:
        sequence, place = work.sequence, self._residency[work.sequence]
        return DecodeRow(sequence.token_at(sequence.num_computed), sequence.num_computed, place.row, place.slot)

    def _decode(self, inputs: StepInputs, with_adapters: bool) -> torch.Tensor:
        """Logits of all rows, from nothing but buffers that stay where they are."""
        attention = DecodeAttention(self._residency.cache.layers, self._kernels.decoding, inputs.rows)
        return self._forward(inputs.tokens, inputs.positions, attention, inputs.tiles, inputs.tiles, with_adapters)

    def _eager(self, prefills: Sequence[Work], decodes: Sequence[Work]) -> torch.Tensor:
        """Tokens of the prefill chunks first, then one token per decoding sequence."""
        batch, device = StepBatch.of(prefills, decodes, self._residency), self._base.device
        body, head = (tiles_tensor(plan_tiles(slots), device) for slots in (batch.slots, batch.sampled_slots))
        ids, places, kept = (
            torch.tensor(x, device=device) for x in ([batch.tokens], [batch.positions], batch.logits_to_keep)
        )
        return self._forward(ids, places, self._attention(batch), body, head, with_adapters=True, logits_to_keep=kept)

    def _attention(self, batch: StepBatch) -> DecodeAttention:
        cache, start = self._residency.cache, batch.decode_start
        prefill = decode = None
        if batch.chunks:
            prefill = StepAttention(cache, batch.chunks, start, batch.rows[:start], batch.positions[:start])
        if start < len(batch.rows):
            decode = DecodeRows.of(cache, batch.rows[start:], batch.positions[start:])
        return DecodeAttention(cache.layers, self._kernels.decoding, decode, prefill, start)

    def _forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: DecodeAttention,
        body: torch.Tensor,
        head: torch.Tensor,
        with_adapters: bool,
        logits_to_keep: torch.Tensor | int = 0,
    ) -> torch.Tensor:
        """tokens, positions: [1, tokens] -> [rows kept, vocabulary]. To keep 0 is to keep all."""
        route = TiledRouting(self._residency.slots.tables, body, head, self._kernels.add_lora)
        with torch.inference_mode(), attending(attention), routing(route if with_adapters else None):
            output = self._base.model(
                input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=logits_to_keep
            )
        logits: torch.Tensor = output.logits[0]
        return logits
