"""Decode steps recorded once and replayed: one launch for a whole forward. Knows rows and slots, no sequences.

A recording is made for a number of rows, with adapters and without, the first time a step needs it. It reads its
inputs from buffers that stay where they are; a step of fewer rows pads it with rows of no tokens, which store
nothing and use no adapter. Other tables or another cache than at recording time would be memory freed long ago, so
they end a recording.
"""

from __future__ import annotations

import logging
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Protocol

import torch

from adapters.lora import BatchedLoraLinear, SlotTable
from adapters.lora_tiles import plan_tiles
from service.engine.decode_attention import DecodeRows
from service.engine.kv_cache import KvCache, Row

logger = logging.getLogger(__name__)


class Recording(Protocol):
    """A forward whose inputs lie in fixed buffers."""

    def replay(self) -> torch.Tensor:
        """Compute it for what the buffers hold now. The result is overwritten by the next replay."""


Recorder = Callable[[Callable[[], torch.Tensor]], Recording]


@dataclass(frozen=True)
class EagerRecording:
    """Runs the forward anew each time: what is left where nothing can be recorded."""

    step: Callable[[], torch.Tensor]

    def replay(self) -> torch.Tensor:
        return self.step()


class DecodeRow(NamedTuple):
    """One decoding sequence's next token; `slot` is None for the base."""

    token: int
    position: int
    row: Row
    slot: int | None


@dataclass(frozen=True)
class StepInputs:
    """The buffers as a forward of `size` rows wants them: tokens, positions [1, size]; tiles [3, size]."""

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: DecodeRows
    tiles: torch.Tensor


class StaticInputs:
    """Everything that differs from one decode step to the next, in one int64 tensor on the device.

    Its lines: token, position, then `DecodeRows`, then the tiles of `adapters.lora_tiles`.
    """

    def __init__(self, max_rows: int, cache: KvCache) -> None:
        self._cache = cache
        self._table = torch.zeros(8, max_rows, dtype=torch.int64, device=cache.device)

    def fill(self, rows: Sequence[DecodeRow]) -> None:
        """The next step's rows; zeros behind them are rows of no tokens and tiles of no rows."""
        table = torch.zeros(self._table.shape, dtype=torch.int64)
        first = self._cache.first_token
        numbers = [(r.token, r.position, first(r.row), r.row.capacity, r.position + 1) for r in rows]
        table[:5, : len(rows)] = torch.tensor(numbers, dtype=torch.int64).T
        tiles = plan_tiles([r.slot for r in rows])
        if tiles:
            table[5:, : len(tiles)] = torch.tensor(tiles, dtype=torch.int64).T
        self._table.copy_(table)

    def view(self, size: int) -> StepInputs:
        lines = self._table[:, :size]
        return StepInputs(lines[0:1], lines[1:2], DecodeRows(lines[2], lines[3], lines[4]), lines[5:8])


class DecodeGraphs:
    """The recordings of decode steps, by number of rows and with or without adapters."""

    def __init__(
        self,
        forward: Callable[[StepInputs, bool], torch.Tensor],
        record: Recorder,
        *,
        cache: KvCache,
        tables: Mapping[BatchedLoraLinear, SlotTable],
        max_num_seqs: int,
    ) -> None:
        """`forward` computes the logits of all rows, [size, vocabulary], from inputs alone; True is with adapters.

        The layers of `cache` and `tables` are what it reads besides; both may change between two steps.
        """
        self._forward = forward
        self._record = record
        self._inputs = StaticInputs(max_num_seqs, cache)
        self._cache, self._tables = cache, tables
        self._sizes = graph_sizes(max_num_seqs)
        self._recordings: dict[tuple[int, bool], Recording] = {}
        self._read = _Watch(())

    def run(self, rows: Sequence[DecodeRow]) -> torch.Tensor:
        """Logits: [rows, vocabulary], overwritten by the next call. Rows of one slot should be neighbours."""
        size = self._sizes[bisect_left(self._sizes, len(rows))]
        with_adapters = any(row.slot is not None for row in rows)
        self._inputs.fill(rows)  # waits until the step before is done, so nothing dropped is still running
        self._drop_stale()
        recording = self._recordings.get((size, with_adapters))
        if recording is None:
            recording = self._recordings[(size, with_adapters)] = self._recorded(size, with_adapters)
        return recording.replay()[: len(rows)]

    def _recorded(self, size: int, with_adapters: bool) -> Recording:
        """Computing a step twice changes nothing, so a recorder may try it on the buffers as they are."""
        inputs = self._inputs.view(size)

        def step() -> torch.Tensor:
            return self._forward(inputs, with_adapters)

        try:
            return self._record(step)
        except RuntimeError:
            logger.exception("engine.graphs_disabled")
            self._record = EagerRecording
            return EagerRecording(step)

    def _drop_stale(self) -> None:
        if not self._read.sees(chain(self._cache.layers, self._tables.values())):
            self._recordings.clear()
            self._read = _Watch(chain(self._cache.layers, self._tables.values()))


class _Watch:
    """Notices when one of some objects was replaced, without keeping them alive."""

    def __init__(self, objects: Iterable[object]) -> None:
        self._references = [weakref.ref(o) for o in objects]

    def sees(self, objects: Iterable[object]) -> bool:
        now = list(objects)
        return len(now) == len(self._references) and all(
            reference() is o for reference, o in zip(self._references, now, strict=True)
        )


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of rows that are recorded: 1, 2, 4, 8, then every eighth; a step is padded to the next."""
    sizes = [1, 2, 4, *range(8, max_num_seqs, 8)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class CudaRecorder:
    """Records CUDA graphs. They share memory for what they compute, so only one may be replayed at a time.

    Only the recording thread is forbidden to allocate or wait meanwhile: training goes on in its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], torch.Tensor]) -> Recording:
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(current):  # restored even if the recording fails midway
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(2):  # compiles kernels and makes work spaces, neither of which can be recorded
                    step()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
                output = step()
        return CudaRecording(graph, output)


@dataclass(frozen=True)
class CudaRecording:
    """A CUDA graph and the tensor it writes."""

    graph: torch.cuda.CUDAGraph
    output: torch.Tensor

    def replay(self) -> torch.Tensor:
        self.graph.replay()
        return self.output
