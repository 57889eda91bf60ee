"""Slabs and rows: classes, growth with contents, return of slabs, no aliasing."""

from __future__ import annotations

import random

import pytest
import torch

from service.engine.kv_cache import KvCache, KvCacheFullError, LayerShape, Row, size_classes


def cache(num_slabs: int = 4, max_model_len: int = 256) -> KvCache:
    layers = [LayerShape(2, 8, 8), LayerShape(1, 4, 6)]
    per_token = (2 * 16 + 10) * 4
    return KvCache(
        layers,
        max_bytes=num_slabs * max_model_len * per_token,
        max_model_len=max_model_len,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def write(c: KvCache, row: Row, position: int, value: float) -> None:
    for layer in c.layers:
        lines = c.destinations([row], [position], layer.num_kv_heads)
        for buffer in (layer.keys, layer.values):
            buffer.index_copy_(0, lines, torch.full((layer.num_kv_heads, buffer.shape[-1]), value))


def read(c: KvCache, row: Row, length: int) -> list[float]:
    found = set()
    for layer in c.layers:
        for buffer in (layer.keys, layer.values):
            view = c.rows(buffer, layer.num_kv_heads, row, row.index + 1)[:, :length]
            assert bool((view == view[:1, :, :1]).all()), "heads and dims were written together"
            found.add(tuple(view[0, :, 0].tolist()))
    assert len(found) == 1
    return list(found.pop())


def test_classes_waste_less_than_half_of_a_sequence() -> None:
    assert size_classes(1024) == [64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert size_classes(320) == [64, 96, 128, 192, 256, 320]


def test_a_budget_that_holds_no_two_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_cache_bytes"):
        cache(num_slabs=1)


def test_growing_brings_the_tokens_along() -> None:
    c = cache()
    row = c.allocate(10)
    for position in range(64):
        write(c, row, position, float(position))
    grown = c.grow(row, 65, 64)
    assert (row.capacity, grown.capacity) == (64, 96)
    assert read(c, grown, 64) == [float(p) for p in range(64)]
    assert c.grow(grown, 96, 65) is grown


def test_a_full_cache_says_so_and_an_emptied_slab_serves_another_size() -> None:
    c = cache(num_slabs=2)
    big = [c.allocate(256), c.allocate(200)]
    with pytest.raises(KvCacheFullError):
        c.allocate(5)
    c.free(big[0])
    small = [c.allocate(5) for _ in range(4)]
    assert c.usage == 1.0
    for row in [*small, big[1]]:
        c.free(row)
    assert c.usage == 0.0


def test_random_traffic_never_lets_two_sequences_share_a_line() -> None:
    c, rng = cache(num_slabs=5), random.Random(1)
    live: dict[int, tuple[Row, list[float]]] = {}
    for step in range(1500):
        key = rng.choice(list(live)) if live and rng.random() < 0.9 else step
        try:
            row, values = live.get(key) or (c.allocate(1), [])
            row = c.grow(row, len(values) + 1, len(values)) if len(values) < 256 else row
        except KvCacheFullError:
            victim = rng.choice(list(live))
            c.free(live.pop(victim)[0])
            continue
        if len(values) < 256:
            write(c, row, len(values), float(step))
            values.append(float(step))
        live[key] = (row, values)
        if rng.random() < 0.02:
            c.free(live.pop(key)[0])
        if step % 100 == 0:
            for kept, written in live.values():
                assert read(c, kept, len(written)) == written
    for row, written in live.values():
        assert read(c, row, len(written)) == written
        c.free(row)
    assert c.usage == 0.0
