"""Embeddings and chat beside each other on a real engine, through the official client."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from service.engine.sequence import GenerationRequest, SamplingParams
from tests.service.real_service import ADAPTER, RealService, real_service

__all__ = ["real_service"]

TEXTS = ["How many adapters are resident?", "A tree keeps one root and bears many fruits.", "naïve café 🌱"]


@pytest.mark.parametrize("tuned", [False, True])
def test_the_client_gets_what_the_engine_computes(tuned: bool, real_service: RealService) -> None:
    model = real_service.tuned if tuned else "tiny"
    answer = real_service.client().embeddings.create(model=model, input=TEXTS, encoding_format="float")
    assert answer.model == model
    tokens = [tuple(real_service.base.tokenizer.encode(text)) for text in TEXTS]
    assert answer.usage.prompt_tokens == sum(map(len, tokens))
    for one, ids in zip(answer.data, tokens, strict=True):
        request = GenerationRequest("check", ids, SamplingParams(), "t", ADAPTER if tuned else None, pooling=True)
        assert one.embedding == asyncio.run(real_service.engine.embed(request)).tolist()
        assert np.linalg.norm(one.embedding) == pytest.approx(1, abs=1e-6)
    by_default = real_service.client(strict=False).embeddings.create(model=model, input=TEXTS)
    assert [one.embedding for one in by_default.data] == [one.embedding for one in answer.data]


def test_an_adapter_changes_the_embedding(real_service: RealService) -> None:
    base, tuned = (
        real_service.client().embeddings.create(model=model, input=TEXTS[0], encoding_format="float").data[0].embedding
        for model in ("tiny", real_service.tuned)
    )
    assert not np.allclose(base, tuned, atol=1e-3)


@pytest.mark.slow
def test_a_request_with_512_inputs_does_not_starve_chat(real_service: RealService) -> None:
    client, done = real_service.client(), threading.Event()

    def embed() -> None:
        inputs = [[5 + number % 400] * 60 for number in range(512)]
        answer = client.embeddings.create(model="tiny", input=inputs, encoding_format="float")
        assert len(answer.data) == 512
        done.set()

    flood = threading.Thread(target=embed)
    flood.start()
    answered = 0
    while not done.is_set():
        client.chat.completions.create(
            model=real_service.tuned, messages=[{"role": "user", "content": "Hello"}], max_tokens=4
        )
        answered += 1
    flood.join()
    assert answered >= 5, "chat must be answered while the flood goes on"
