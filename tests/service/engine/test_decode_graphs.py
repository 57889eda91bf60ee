"""Recorded decode steps give the tokens of the plain runner, whoever is in the batch and whatever happens to it."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from adapters.lora import BatchedLoraLinear, LoraPart, SlotTable
from adapters.lora_triton import add_lora
from service.engine.base_model import BaseModel, load_base_model
from service.engine.decode_graphs import (
    DecodeGraphs,
    DecodeRow,
    EagerRecording,
    Recorder,
    StaticInputs,
    StepInputs,
    graph_sizes,
)
from service.engine.decode_triton import TritonDecoding
from service.engine.kernel_forward import KernelForward, Kernels, kernel_forward, triton_kernels
from service.engine.kv_cache import KvCache, LayerShape, Row
from service.engine.residency import Residency
from tests.service.engine.conftest import Rig
from tests.service.engine.plain_kernels import PlainDecoding, plain_add_lora
from tests.service.engine.tape import TapeRecorder

pytestmark = pytest.mark.anyio
PLAIN = Kernels(PlainDecoding(), plain_add_lora)
QUESTIONS: list[tuple[list[int], str | None]] = [
    ([5, 9, 11], "narrow"),
    ([40, 41], None),
    ([7] * 30, "wide"),
    ([100, 3, 8, 200], "narrow"),
    ([12, 13], "head"),
    ([60, 61, 62], "patterned"),
]

MakeRig = Callable[..., Rig]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> TapeRecorder:
    return TapeRecorder(monkeypatch)


@pytest.fixture
def make_rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeRig]:
    """A rig whose runner computes by these kernels and this recorder, as on CUDA."""
    made: list[Rig] = []

    def make(base: BaseModel, kernels: Kernels, record: Recorder | None, **config: Any) -> Rig:
        def forward(base: BaseModel, residency: Residency, max_num_seqs: int, cuda_graphs: bool) -> KernelForward:
            return KernelForward(base, residency, kernels, max_num_seqs, record if cuda_graphs else None)

        monkeypatch.setattr("service.engine.machinery.kernel_forward", forward)
        made.append(Rig(base, **{"kv_cache_bytes": 1 << 21, **config}))
        monkeypatch.undo()
        return made[-1]

    yield make
    for rig in made:
        rig.engine.shutdown(0)


def small_cache(max_model_len: int = 64) -> KvCache:
    return KvCache(
        [LayerShape(1, 4, 4)],
        max_bytes=1 << 18,
        max_model_len=max_model_len,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


async def crowd(
    rig: Rig, questions: list[tuple[list[int], str | None]] = QUESTIONS, **sampling: Any
) -> list[list[int]]:
    return list(await asyncio.gather(*(rig.tokens(prompt, adapter, **sampling) for prompt, adapter in questions)))


async def test_recorded_steps_give_the_plain_runners_tokens(
    base: BaseModel, rig: Rig, make_rig: MakeRig, recorder: TapeRecorder
) -> None:
    recorded = make_rig(base, PLAIN, recorder)
    assert await crowd(recorded) == await crowd(rig)
    assert sum(r.replays for r in recorder.recordings) >= 15


@pytest.mark.slow
async def test_wider_tables_and_tables_of_new_sites_are_noticed(
    base: BaseModel, rig: Rig, make_rig: MakeRig, recorder: TapeRecorder
) -> None:
    """Each of these questions decodes alone, on a recording of the one before if that were kept."""
    recorded = make_rig(base, PLAIN, recorder)
    for adapter in ("attention", "narrow", "wide", "head", "narrow"):
        answers = [await r.tokens([5, 9, 11], adapter, max_tokens=6) for r in (recorded, rig)]
        assert answers[0] == answers[1], adapter
    assert len(recorder.recordings) == 4, "the last one found a recording for tables as they were"


async def test_an_adapter_loaded_over_another_needs_no_new_recording(
    base: BaseModel, rig: Rig, make_rig: MakeRig, recorder: TapeRecorder
) -> None:
    recorded = make_rig(base, PLAIN, recorder, max_lora_slots=1)
    for adapter in ("wide", "narrow", "patterned", "wide"):
        answers = [await r.tokens([5, 9, 11], adapter, max_tokens=6) for r in (recorded, rig)]
        assert answers[0] == answers[1], adapter
    assert recorded.ear.evictions == ["capacity"] * 3
    assert len(recorder.recordings) == 1


@pytest.mark.slow
async def test_preempted_sequences_are_replayed_to_the_same_tokens(
    base: BaseModel, rig: Rig, make_rig: MakeRig, recorder: TapeRecorder
) -> None:
    """A replayed row computes without choosing a token, between rows that do choose."""
    recorded = make_rig(base, PLAIN, recorder, kv_cache_bytes=1 << 20)
    long: list[tuple[list[int], str | None]] = [([i + 5] * 20, "narrow" if i % 2 else None) for i in range(12)]
    answers = await crowd(recorded, long, max_tokens=50)
    assert recorded.engine.stats().num_preemptions > 0
    assert answers == await crowd(rig, long, max_tokens=50)


async def test_embeddings_beside_recorded_steps_are_the_plain_runners(
    base: BaseModel, rig: Rig, make_rig: MakeRig, recorder: TapeRecorder
) -> None:
    recorded = make_rig(base, PLAIN, recorder)
    prompt = [9, 8, 7] * 20
    answer, vector = await asyncio.gather(recorded.tokens([5, 9, 11], "narrow"), recorded.embed(prompt, "wide"))
    assert answer == await rig.tokens([5, 9, 11], "narrow")
    torch.testing.assert_close(torch.from_numpy(vector), torch.from_numpy(await rig.embed(prompt, "wide")))


async def test_a_model_with_biases_is_recorded_without_waiting_for_the_device(
    tiny_llama_dir: Path, tmp_path: Path, make_rig: MakeRig, recorder: TapeRecorder
) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path, dirs_exist_ok=True)
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    base = load_base_model(str(tmp_path), quantization="none")
    plain = Rig(base)
    recorded = make_rig(base, PLAIN, recorder)
    assert await crowd(recorded, max_tokens=6) == await crowd(plain, max_tokens=6)
    plain.engine.shutdown(0)
    assert recorder.recordings


async def test_what_cannot_be_recorded_runs_eagerly_and_says_so_once(
    base: BaseModel, rig: Rig, make_rig: MakeRig, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(step: Callable[[], torch.Tensor]) -> NoReturn:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert await crowd(make_rig(base, PLAIN, refuse)) == await crowd(rig)
    assert [record.message for record in caplog.records] == ["engine.graphs_disabled"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a device")
@pytest.mark.parametrize("record", [EagerRecording, None])
async def test_the_kernels_give_the_plain_runners_tokens(
    base: BaseModel, rig: Rig, make_rig: MakeRig, record: Recorder | None
) -> None:
    """With padded steps as they are recorded, and with steps of prompts and decode rows mixed."""
    interpreted = make_rig(base, Kernels(TritonDecoding(), add_lora), record)
    questions: list[tuple[list[int], str | None]] = [([5, 9, 11], "narrow"), ([7] * 18, "wide"), ([40], None)]
    assert await crowd(interpreted, questions, max_tokens=2) == await crowd(rig, questions, max_tokens=2)


def test_the_cpu_and_a_machine_where_triton_fails_use_the_runners_own_forward(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nobody, cuda = cast(Residency, None), replace(base, device=torch.device("cuda"))
    assert kernel_forward(replace(base, device=torch.device("cpu")), nobody, 8, cuda_graphs=True) is None
    assert not caplog.records

    def no_compiler(device: torch.device) -> NoReturn:
        raise RuntimeError("Failed to find C compiler")

    with monkeypatch.context() as patch:
        patch.setattr("service.engine.kernel_forward.triton_kernels", no_compiler)
        assert kernel_forward(cuda, nobody, 8, cuda_graphs=True) is None
    monkeypatch.setitem(sys.modules, "adapters.lora_triton", None)
    assert kernel_forward(cuda, nobody, 8, cuda_graphs=True) is None
    assert [record.message for record in caplog.records] == ["engine.no_triton"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a device")
def test_the_kernels_are_tried_before_they_are_relied_on() -> None:
    assert isinstance(triton_kernels(torch.device("cpu")).decoding, TritonDecoding)


def test_steps_are_padded_to_few_sizes_and_never_beyond_the_largest() -> None:
    assert graph_sizes(32) == [1, 2, 4, 8, 16, 24, 32]
    assert graph_sizes(12) == [1, 2, 4, 8, 12]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(1) == [1]


def test_rows_behind_the_last_one_have_no_tokens_and_no_tile() -> None:
    """Whatever the step before left there."""
    inputs = StaticInputs(4, small_cache(max_model_len=512))
    inputs.fill([DecodeRow(3, 70, Row(1, 2, 96), slot) for slot in (0, 1, 2, 2)])
    before = inputs.view(4)
    assert before.rows.first.tolist() == [512 + 2 * 96] * 4
    assert before.tiles.T.tolist() == [[0, 0, 1], [1, 1, 1], [2, 2, 2], [0, 0, 0]]
    inputs.fill([DecodeRow(9, 0, Row(0, 1, 64), None)])
    after = inputs.view(4)
    assert (after.tokens.tolist(), after.positions.tolist()) == ([[9, 0, 0, 0]], [[0, 0, 0, 0]])
    assert (after.rows.lengths.tolist(), after.rows.capacity.tolist()) == ([1, 0, 0, 0], [64, 0, 0, 0])
    assert not after.tiles.any()
    assert after.tokens.data_ptr() == before.tokens.data_ptr()


def test_recordings_end_when_the_cache_or_the_tables_are_replaced() -> None:
    site = BatchedLoraLinear(nn.Identity(), 4, (LoraPart("q", 4),))
    cache, tables = small_cache(), {site: SlotTable(site, 1, 8, torch.float32, torch.device("cpu"))}
    recorded: list[int] = []

    def forward(inputs: StepInputs, with_adapters: bool) -> torch.Tensor:
        return torch.zeros(inputs.tokens.shape[1], 5)

    def record(step: Callable[[], torch.Tensor]) -> EagerRecording:
        recorded.append(len(step()))
        return EagerRecording(step)

    graphs = DecodeGraphs(forward, record, cache=cache, tables=tables, max_num_seqs=8)
    row = DecodeRow(1, 0, Row(0, 0, 64), None)

    def new_recordings() -> list[int]:
        recorded.clear()
        for rows in ([row], [row] * 3, [row._replace(slot=0)] * 3):
            assert graphs.run(rows).shape == (len(rows), 5)
        return recorded

    assert new_recordings() == [1, 4, 4]
    assert new_recordings() == []
    tables[site] = SlotTable(site, 1, 16, torch.float32, torch.device("cpu"))
    assert new_recordings() == [1, 4, 4]
    cache.layers[0] = small_cache().layers[0]
    assert new_recordings() == [1, 4, 4]
    assert new_recordings() == []
