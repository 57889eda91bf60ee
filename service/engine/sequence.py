"""A request on its way through the engine: what was asked, what has been computed. Knows no tensors."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from itertools import pairwise
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from service.engine.errors import EngineError
from service.engine.grammar import AnyGrammar, AnyMatcher
from service.engine.phases import Phase, PhaseTimes


class FinishReason(StrEnum):
    """Why a sequence ended. The first two are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the defaults are OpenAI's, the extra knobs vLLM's.

    `top_k=0`, `min_p=0` and `top_p=1` switch the filter off; `temperature=0` is greedy.
    `logprobs` is the number of alternatives reported beside each token; None reports none at all.
    `logit_bias` adds to the logits of single tokens, `grammar` leaves only the tokens that keep to it; both come after
    the penalties and before everything else.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: AnyGrammar | None = None

    @property
    def reshapes_logits(self) -> bool:
        """Whether the tokens to choose from are others than the model's own."""
        return self.has_penalties or bool(self.logit_bias) or self.grammar is not None

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


@dataclass(frozen=True)
class AskedBy:
    """The API request that a sequence belongs to, for the log."""

    request_id: str
    trace_id: str


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue. `adapter` is a content digest; None asks the base.

    With `pooling` nothing is generated: the prompt is only computed, and the last chunk carries its embedding.

    With `measure` the last chunk also tells how surprising an answer was to the model that gave it (`answer_nll`,
    `answer_entropy`) or, with `pooling`, the prompt to the base (`prompt_nll`).

    After `timeout_seconds` the request ends, waiting or running, with what it has.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    tenant: str
    adapter: str | None = None
    priority: int = 0
    pooling: bool = False
    timeout_seconds: float | None = None
    measure: bool = False
    asked_by: AskedBy | None = None

    @property
    def log_ids(self) -> dict[str, str]:
        """What a log line about it carries."""
        ids = {"sequence_id": self.request_id, "tenant": self.tenant}
        if self.asked_by is not None:
            ids |= {"request_id": self.asked_by.request_id, "trace_id": self.asked_by.trace_id}
        return ids

    @classmethod
    def probe(
        cls, request_id: str, prompt_token_ids: tuple[int, ...], tenant: str, *, priority: int
    ) -> GenerationRequest:
        """What the base makes of a prompt: its embedding and its `prompt_nll`."""
        sampling = SamplingParams()
        return cls(request_id, prompt_token_ids, sampling, tenant, priority=priority, pooling=True, measure=True)


@dataclass(frozen=True)
class Measured:
    """What was measured of a sequence, in nats; None: not asked for, or not known.

    `prompt_nll` is the mean of -log p over the prompt's tokens behind the first, p being the base's; the others are
    means over all sampled tokens (one that ends the answer included), of the model's own distribution: before
    temperature, penalties, bias and grammar.
    """

    prompt_nll: float | None = None
    answer_nll: float | None = None
    answer_entropy: float | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability; `bytes` joins split UTF-8 characters again."""

    token: str
    token_id: int
    logprob: float
    bytes: tuple[int, ...]
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class OutputChunk:
    """What became final since the last chunk. Only the last one carries a `finish_reason`.

    `embedding` is [hidden], of length one, in the only chunk of a pooling request; `refusal` says, in the only chunk,
    that the request was never taken in. The last chunk of a request with `measure` carries what `Measured` says.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_output_tokens: int
    error: str | None = None
    embedding: NDArray[np.float32] | None = None
    num_cached_tokens: int = 0
    refusal: EngineError | None = None
    prompt_nll: float | None = None
    answer_nll: float | None = None
    answer_entropy: float | None = None

    @classmethod
    def of_refusal(cls, refusal: EngineError) -> OutputChunk:
        return cls("", (), None, FinishReason.ERROR, 0, 0, error=refusal.message, refusal=refusal)


@dataclass(frozen=True)
class SequenceReport:
    """One finished sequence, for whoever observes the engine. Times in seconds.

    `num_cached_tokens` of the prompt were not computed but copied; None when it never started. `arrival` and the times
    of `phases` are `time.monotonic()`.
    """

    request_id: str
    tenant: str
    adapter: str | None
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    queue_seconds: float | None
    ttft_seconds: float | None
    e2e_seconds: float
    inter_token_seconds: tuple[float, ...]
    num_cached_tokens: int | None = None
    answer_nll: float | None = None
    answer_entropy: float | None = None
    arrival: float | None = None
    phases: tuple[Phase, ...] = ()


class SequenceStatus(Enum):
    """A preempted sequence is WAITING again, with its output tokens, to be replayed."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """The engine's record of a request: its tokens and how many of them have their KV in the cache.

    Invariant: `num_computed <= len(tokens)`; the sequence samples only when one token is left to compute.
    `num_cached_tokens` of the prompt were copied when it first started, not computed.
    A preempted sequence starts again at `num_computed = 0`: its prompt is prefilled on the same chunk grid
    and its output tokens are decoded one by one again, so its KV gets the same bits as before.
    """

    request: GenerationRequest
    max_tokens: int
    arrival: float = field(default_factory=time.monotonic)
    status: SequenceStatus = SequenceStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_preemptions: int = 0
    num_charged: int = 0
    """Tokens counted for its tenant; a replay after preemption is not counted again."""
    num_passed: int = 0
    """How many later requests started while this one found no adapter slot."""
    num_cached_tokens: int | None = None
    times: PhaseTimes = field(default_factory=PhaseTimes)
    token_times: list[float] = field(default_factory=list)
    nll_sum: float = 0.0
    entropy_sum: float = 0.0
    """Over `output_token_ids`; a replay after preemption samples nothing, so it adds nothing."""
    num_crashes: int = 0
    matcher: AnyMatcher | None = field(init=False)

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.matcher = None if sampling.grammar is None else sampling.grammar.start(sampling.ignore_eos)

    @property
    def needs_all_hidden(self) -> bool:
        """It pools the hidden states of its whole prompt: it samples nothing, and may not start from cached tokens."""
        return self.request.pooling

    @property
    def has_started(self) -> bool:
        return self.times.first_scheduled is not None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_prefill(self) -> bool:
        return self.num_computed < self.num_prompt_tokens

    @property
    def samples_next(self) -> bool:
        """Whether computing one more token yields a new one (and not one replayed after preemption)."""
        return self.num_computed == self.num_tokens - 1

    def token_at(self, position: int) -> int:
        prompt = self.request.prompt_token_ids
        return prompt[position] if position < len(prompt) else self.output_token_ids[position - len(prompt)]

    def take(self, token_id: int, at: float, measures: tuple[float, float] | None) -> None:
        """A sampled token, at a time; with -log p and entropy where they are asked for."""
        self.output_token_ids.append(token_id)
        self.token_times.append(at)
        if measures is not None:
            self.nll_sum += measures[0]
            self.entropy_sum += measures[1]

    def measured(self, prompt_nll: float | None = None) -> Measured:
        """`prompt_nll` is known to whoever computed the prompt."""
        count = len(self.output_token_ids)
        if not self.request.measure or not count:
            return Measured(_finite(prompt_nll))
        return Measured(_finite(prompt_nll), _finite(self.nll_sum / count), _finite(self.entropy_sum / count))

    def report(self, reason: FinishReason, now: float) -> SequenceReport:
        times, measured = self.token_times, self.measured()
        started = self.times.first_scheduled
        return SequenceReport(
            request_id=self.request.request_id,
            tenant=self.request.tenant,
            adapter=self.request.adapter,
            finish_reason=reason,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=len(self.output_token_ids),
            queue_seconds=None if started is None else started - self.arrival,
            ttft_seconds=times[0] - self.arrival if times else None,
            e2e_seconds=now - self.arrival,
            inter_token_seconds=tuple(b - a for a, b in pairwise(times)),
            num_cached_tokens=self.num_cached_tokens,
            answer_nll=measured.answer_nll,
            answer_entropy=measured.answer_entropy,
            arrival=self.arrival,
            phases=self.times.phases(self.arrival, times[0] if times else None, now),
        )


def _finite(value: float | None) -> float | None:
    return None if value is None or not isfinite(value) else value
