"""Logits -> tokens. Every row is computed from its own logits and its own random number, so the batch does not matter.

A sequence's i-th token uses a number drawn from Philox(seed, i): the same seed gives the same text in any crowd,
and a preempted sequence needs no saved generator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from service.engine.sequence import SamplingParams, Sequence
from service.engine.token_measures import token_measures

_COLDEST = 1e-4
"""Below this temperature a float32 softmax is the maximum and nothing else."""


@dataclass(frozen=True)
class Sampled:
    """One row's choice. `top` holds (token id, log-probability) of the likeliest tokens, `measures` what
    `token_measures` gives; each if asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    measures: tuple[float, float] | None = None


class Sampler:
    """Penalties, bias and grammar, then temperature, top-k, top-p and min-p.

    Log-probabilities and measures are those of the model, before all that.
    """

    def sample(self, logits: torch.Tensor, sequences: Rows[Sequence], seeds: Rows[int]) -> list[Sampled]:
        """logits: [rows, vocabulary], one row per sequence."""
        logits = logits.float()
        raw = logits
        params = [s.request.sampling for s in sequences]
        if any(p.reshapes_logits for p in params):
            logits = _reshaped(logits, sequences)
        chosen = logits.argmax(dim=-1)
        warm = [row for row, p in enumerate(params) if p.temperature >= _COLDEST]
        if warm:
            numbers = [_uniform(seeds[row], len(sequences[row].output_token_ids)) for row in warm]
            chosen[warm] = _draw(logits[warm], [params[row] for row in warm], numbers)
        return _described(raw, chosen, params, _measures(raw, chosen, sequences))


def _described(
    logits: torch.Tensor,
    chosen: torch.Tensor,
    params: list[SamplingParams],
    measures: Rows[tuple[float, float] | None],
) -> list[Sampled]:
    """Nothing here waits for the device once per row: rows that report equally many alternatives go together."""
    tokens: list[int] = chosen.tolist()
    sampled = [Sampled(token, measures=measured) for token, measured in zip(tokens, measures, strict=True)]
    for count in {p.logprobs for p in params if p.logprobs is not None}:
        rows = [row for row, p in enumerate(params) if p.logprobs == count]
        logprobs = torch.log_softmax(logits[rows], dim=-1)
        values, ids = logprobs.topk(min(count, logprobs.shape[-1]))
        own = logprobs.gather(1, chosen[rows, None]).squeeze(1)
        for row, logprob, *top in zip(rows, own.tolist(), ids.tolist(), values.tolist(), strict=True):
            sampled[row] = Sampled(tokens[row], logprob, tuple(zip(*top, strict=True)), measures[row])
    return sampled


def _measures(
    logits: torch.Tensor, chosen: torch.Tensor, sequences: Rows[Sequence]
) -> Rows[tuple[float, float] | None]:
    """Of the rows that ask for them."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.request.measure]
    if len(rows) == len(sequences):
        return token_measures(logits, chosen)
    found: list[tuple[float, float] | None] = [None] * len(sequences)
    if rows:
        for row, measures in zip(rows, token_measures(logits[rows], chosen[rows]), strict=True):
            found[row] = measures
    return found


def _uniform(seed: int, position: int) -> float:
    """The `position`-th number of this seed's stream, in [0, 1)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _reshaped(logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """A copy in which each row obeys its own sequence: penalties, then bias, then grammar."""
    logits = logits.clone()
    for row, sequence in enumerate(sequences):
        if sequence.request.sampling.has_penalties:
            _penalize(logits[row], sequence)
        if bias := sequence.request.sampling.logit_bias:
            ids, values = zip(*bias, strict=True)
            logits[row, list(ids)] += torch.tensor(values, device=logits.device)
    _constrain(logits, sequences)
    return logits


def _constrain(logits: torch.Tensor, sequences: Rows[Sequence]) -> None:
    """Leave to each row with a grammar only the tokens that may come next."""
    matchers = {row: s.matcher for row, s in enumerate(sequences) if s.matcher is not None and not s.matcher.is_free}
    if not matchers:
        return
    grammar = sequences[min(matchers)].request.sampling.grammar
    assert grammar is not None, "a matcher comes from its request's grammar"
    bits = np.empty((len(matchers), grammar.num_words), dtype=np.int32)
    for matcher, row_bits in zip(matchers.values(), bits, strict=True):
        matcher.allowed(row_bits)
    forbidden = np.unpackbits(bits.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little") == 0
    rows = list(matchers)
    mask = torch.from_numpy(forbidden).to(logits.device)
    logits[rows] = logits[rows].masked_fill(mask, float("-inf"))


def _penalize(logits: torch.Tensor, sequence: Sequence) -> None:
    """Presence and frequency count the output (OpenAI); repetition also the prompt (CTRL, arXiv 1909.05858)."""
    p = sequence.request.sampling
    device = logits.device
    counts = Counter(sequence.output_token_ids)
    if counts and (p.presence_penalty or p.frequency_penalty):
        ids = torch.tensor(list(counts), device=device)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=device)
        logits[ids] -= p.presence_penalty + p.frequency_penalty * times
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.request.prompt_token_ids) | set(counts)), device=device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)


def _draw(logits: torch.Tensor, params: list[SamplingParams], numbers: list[float]) -> torch.Tensor:
    """Inverse-CDF sampling among the tokens that the filters leave, likeliest first: [rows, vocabulary] -> [rows]."""
    device, vocabulary = logits.device, logits.shape[-1]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    scaled = logits / column([p.temperature for p in params])
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    probs = torch.softmax(ordered, dim=-1)
    rank = torch.arange(vocabulary, device=device)
    keep = rank < column([float(p.top_k or vocabulary) for p in params])
    probs = probs * keep
    before = probs.cumsum(dim=-1) - probs
    keep &= before < column([p.top_p for p in params]) * probs.sum(dim=-1, keepdim=True)
    keep &= probs >= column([p.min_p for p in params]) * probs[:, :1]
    keep &= probs > 0  # a token that a grammar forbids must not be the last one kept
    keep[:, 0] = True
    cumulative = (probs * keep).cumsum(dim=-1)
    target = column(numbers) * cumulative[:, -1:]
    chosen = (cumulative <= target).sum(dim=-1, keepdim=True)
    last = keep.sum(dim=-1, keepdim=True) - 1  # rounding may carry the target past the last kept token
    return ids.gather(1, torch.minimum(chosen, last)).squeeze(1)
