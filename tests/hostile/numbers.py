"""Hostile numbers: too many, too few, not finite, not numbers."""

from __future__ import annotations

from tests.hostile.cases import Case, chat, chat_text, get, job, post

_HUGE = 10**100
_DIGITS = "9" * 10_000


CASES = [
    Case("n of 0", chat(n=0), param="n"),
    Case("n below 0", chat(n=-1), param="n"),
    Case("n of 10^100", chat(n=_HUGE), param="n"),
    Case("n as a boolean", chat(n=True), param="n"),
    Case("n as a text", chat(n="1"), param="n"),
    Case("n as a fraction", chat(n=1.5), param="n"),
    Case("max_tokens of 0", chat(max_tokens=0), param="max_tokens"),
    Case("max_tokens below 0", chat(max_tokens=-(2**63)), param="max_tokens"),
    Case("max_tokens of 10^100", chat(max_tokens=_HUGE), param="max_tokens"),
    Case("max_tokens as a boolean", chat(max_tokens=True), param="max_tokens"),
    Case("a number of 10 000 digits", chat_text(f'"max_tokens":{_DIGITS}'), says="digits"),
    Case("temperature NaN", chat_text('"temperature":NaN'), says="NaN"),
    Case("temperature Infinity", chat_text('"temperature":Infinity'), says="Infinity"),
    Case("temperature -Infinity", chat_text('"temperature":-Infinity'), says="Infinity"),
    Case("temperature of 1e400", chat_text('"temperature":1e400'), param="temperature"),
    Case("temperature below 0", chat(temperature=-1), param="temperature"),
    Case("temperature as a boolean", chat(temperature=False), param="temperature"),
    Case("temperature so small that it divides to infinity", chat(temperature=5e-324), 200),
    Case("top_p below 0", chat(top_p=-0.1), param="top_p"),
    Case("top_k of 10^100", chat(top_k=_HUGE), param="top_k"),
    Case("top_k of 2^63 - 1", chat(top_k=2**63 - 1), param="top_k"),
    Case("min_p of 1 and top_p of 0", chat(min_p=1, top_p=0), 200),
    Case("repetition_penalty of almost 0", chat(repetition_penalty=5e-324), 200),
    Case("a bias for a token that is not", chat(logit_bias={"999999999": 1}), param="logit_bias"),
    Case("a bias for a negative token", chat(logit_bias={"-1": 1}), param="logit_bias"),
    Case("a bias of NaN", chat_text('"logit_bias":{"1":NaN}'), says="NaN"),
    Case("20 000 biases", chat(logit_bias={str(n): 1 for n in range(20_000)}), param="logit_bias"),
    Case("a bias for an Arabic digit", chat(logit_bias={"٣": 1}), param="logit_bias"),
    Case("every token forbidden", chat(logit_bias={str(n): -100 for n in range(300)}), 200),
    Case("a seed of 10^100", chat(seed=_HUGE), param="seed"),
    Case("a seed of -2^63", chat(seed=-(2**63)), 200),
    Case("priority of 10^100", chat(priority=_HUGE), param="priority"),
    Case("a timeout of 0", chat(timeout=0), param="timeout"),
    Case("a timeout of a nanosecond", chat(timeout=1e-9), 504),
    Case("top_logprobs of 10^9", chat(logprobs=True, top_logprobs=10**9), param="top_logprobs"),
    Case("tokens that are not", post("/v1/completions", {"model": "tiny", "prompt": [[_HUGE]]}), param="prompt"),
    Case("negative tokens", post("/v1/completions", {"model": "tiny", "prompt": [-1]}), param="prompt"),
    Case("booleans for tokens", post("/v1/completions", {"model": "tiny", "prompt": [True]}), param="prompt"),
    Case(
        "embeddings of tokens that are not", post("/v1/embeddings", {"model": "tiny", "input": [_HUGE]}), param="input"
    ),
    Case(
        "embeddings of 10^9 dimensions",
        post("/v1/embeddings", {"model": "tiny", "input": "a", "dimensions": 10**9}),
        param="dimensions",
    ),
    Case("a page of 10^100", get(f"/v1/files?limit={_HUGE}"), param="limit"),
    Case("a page of NaN", get("/v1/files?limit=NaN"), param="limit"),
    Case("a page below 0", get("/v1/fine_tuning/jobs?limit=-1"), param="limit"),
    Case("epochs of 10^100", job(hyperparameters={"n_epochs": _HUGE}), param="hyperparameters.n_epochs"),
    Case("rank 100 000", job(hyperparameters={"lora_r": 100_000}), param="hyperparameters.lora_r"),
    Case("rank of 10^100", job(hyperparameters={"lora_r": _HUGE}), param="hyperparameters.lora_r"),
    Case("alpha of 10^308", job(hyperparameters={"lora_alpha": 1e308}), param="hyperparameters.lora_alpha"),
    Case("eval_every of 10^100", job(hyperparameters={"eval_every": _HUGE}), param="hyperparameters.eval_every"),
    Case(
        "patience of 10^100",
        job(hyperparameters={"early_stopping_patience": _HUGE}),
        param="hyperparameters.early_stopping_patience",
    ),
    Case(
        "a layer of 10^100",
        job(hyperparameters={"layers_to_transform": [_HUGE]}),
        param="hyperparameters.layers_to_transform[0]",
    ),
    Case("a seed for training of 2^31", job(seed=2**31), param="seed"),
    Case("a rating of NaN", post("/v1/feedback", {"completion_id": "a", "rating": "NaN"}), param="rating"),
    Case("capture for 10^100 days", post("/v1/settings", {"capture_days": _HUGE}, "PUT"), param="capture_days"),
]
