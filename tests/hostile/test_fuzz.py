"""Bytes that nobody wrote by hand, for the two readers of tenants' files: an answer or a complaint, never a crash."""

from __future__ import annotations

import io
import json
import struct
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.dataset import BadLine, read_examples, read_lines
from adapters.errors import AdapterFormatError, DatasetError
from adapters.example import parse_example, parse_preference
from adapters.lora_weights import BaseSignature, LinearShape
from adapters.peft_format import read_adapter, write_adapter
from tests.adapters.loras import random_lora

SHAPES = {f"model.layers.0.{name}": LinearShape(8, 8) for name in ("q_proj", "k_proj")}
BASE = BaseSignature(SHAPES, fingerprint="of-the-fuzzed-base")

FEW, MANY = 50, 3000

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "messages",
                    "role",
                    "content",
                    "prompt",
                    "completion",
                    "metadata",
                    "assertions",
                    "regex",
                    "weight",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
_LINE = st.binary(max_size=60) | _JSON.map(lambda value: json.dumps(value).encode())
_FILE = st.lists(_LINE, max_size=8).map(b"\n".join)


def _read_lines(content: bytes) -> None:
    """What is taken can be written down again; what is not has a complaint that can be sent."""
    examples = read_lines(io.BytesIO(content), parse_example)
    pairs = read_lines(io.BytesIO(content), parse_preference)
    for item in chain(examples, pairs):
        if isinstance(item, BadLine):
            assert item.message.encode() and item.line >= 1
        else:
            assert repr(item).encode()
    try:
        list(read_examples(io.BytesIO(content)))
    except DatasetError as error:
        assert str(error).encode()


@pytest.mark.slow
@settings(max_examples=FEW, deadline=None, derandomize=True)
@given(_FILE)
def test_a_training_file_of_any_bytes_is_read_or_complained_about(content: bytes) -> None:
    _read_lines(content)


@pytest.mark.slow
@settings(max_examples=MANY, deadline=None, derandomize=True)
@given(_FILE)
def test_many_training_files_of_any_bytes_are_read_or_complained_about(content: bytes) -> None:
    _read_lines(content)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz")
    write_adapter(directory, random_lora(BASE, seed=1), base_name="tiny", base=BASE)
    (directory / "honest").write_bytes((directory / "adapter_model.safetensors").read_bytes())
    return directory


_HEADER = st.dictionaries(
    st.sampled_from([f"base_model.model.{name}.lora_{half}.weight" for name in SHAPES for half in "AB"]) | st.text(),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "I64", "F8_E4M3", "", "BOOL"]),
            "shape": st.lists(st.integers(-1, 2**63), max_size=3),
            "data_offsets": st.lists(st.integers(-1, 2**63), max_size=3),
        }
    )
    | _JSON,
    max_size=5,
).map(lambda header: json.dumps(header).encode())
_TENSORS = (
    st.binary(max_size=200)
    | st.tuples(_HEADER, st.binary(max_size=64)).map(lambda p: struct.pack("<Q", len(p[0])) + p[0] + p[1])
    | st.tuples(st.integers(0, 2**64 - 1), _HEADER).map(lambda p: struct.pack("<Q", p[0]) + p[1])
)
_FLIP = st.tuples(st.integers(0, 10**6), st.integers(1, 255))


def _read_weights(directory: Path, content: bytes) -> None:
    (directory / "adapter_model.safetensors").write_bytes(content)
    try:
        read = read_adapter(directory, BASE, max_rank=64)
    except AdapterFormatError as error:
        assert str(error).encode()
    else:
        assert read.modules.keys() == SHAPES.keys()


@settings(max_examples=FEW, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=_TENSORS)
def test_weights_of_any_bytes_are_refused(adapter: Path, content: bytes) -> None:
    _read_weights(adapter, content)


@settings(max_examples=FEW, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(_FLIP, min_size=1, max_size=4))
def test_flipped_bytes_of_weights_are_refused_or_still_weights(adapter: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray((adapter / "honest").read_bytes())
    for place, flip in flips:
        content[place % len(content)] ^= flip
    _read_weights(adapter, bytes(content))


@pytest.mark.slow
@settings(max_examples=MANY, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=_TENSORS)
def test_many_weights_of_any_bytes_are_refused(adapter: Path, content: bytes) -> None:
    _read_weights(adapter, content)
