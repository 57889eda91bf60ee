"""One request's way out: tokens become text chunks, and it is known when the answer is complete.

Knows the tokenizer and the caller's callback, not the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from service.engine.base_description import BaseDescription
from service.engine.detokenizer import Detokenizer, TokenBytes
from service.engine.errors import EngineError
from service.engine.sampler import Sampled
from service.engine.sequence import FinishReason, GenerationRequest, Measured, OutputChunk, TokenLogprob

NOTHING_MEASURED = Measured()


class Response:
    """Collects a sequence's tokens and sends what is final."""

    def __init__(
        self,
        request: GenerationRequest,
        base: BaseDescription,
        token_bytes: TokenBytes,
        on_chunk: Callable[[OutputChunk], None],
    ) -> None:
        self._request = request
        self._token_bytes = token_bytes
        self._on_chunk = on_chunk
        sampling = request.sampling
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._eos_ids = frozenset() if sampling.ignore_eos else base.eos_token_ids
        self._text = Detokenizer(base.tokenizer, token_bytes, sampling.stop, sampling.include_stop_str_in_output)
        self._num_tokens = 0
        self.num_cached_tokens = 0
        self._pending_text = ""
        self._pending_ids: list[int] = []
        self._pending_logprobs: list[TokenLogprob] = []

    def add(self, token: Sampled, is_last: bool) -> FinishReason | None:
        """Take a token in; returns why the answer ends with it, or None. The text of a stop token is not sent."""
        self._num_tokens += 1
        self._pending_ids.append(token.token_id)
        if token.token_id in self._eos_ids or token.token_id in self._stop_ids:
            return FinishReason.STOP
        if token.logprob is not None:
            self._pending_logprobs.append(self._describe(token))
        self._pending_text += self._text.push(token.token_id)
        if self._text.stopped:
            return FinishReason.STOP
        if is_last:
            return FinishReason.LENGTH
        if self._pending_text:
            self._send(None)
        return None

    def finish(
        self,
        reason: FinishReason,
        error: str | None = None,
        embedding: NDArray[np.float32] | None = None,
        measured: Measured = NOTHING_MEASURED,
    ) -> None:
        """Send the last chunk with all that was held back."""
        self._pending_text += self._text.flush()
        self._send(reason, error, embedding, measured)

    def refuse(self, refusal: EngineError) -> None:
        """Send, as the last chunk, that there is no answer."""
        self._on_chunk(OutputChunk.of_refusal(refusal))

    def abandon(self, error: str) -> None:
        """Send a last chunk that says so and nothing else: what was held back may be what went wrong."""
        self._pending_text, self._pending_ids, self._pending_logprobs = "", [], []
        self._send(FinishReason.ERROR, error)

    def _send(
        self,
        reason: FinishReason | None,
        error: str | None = None,
        embedding: NDArray[np.float32] | None = None,
        measured: Measured = NOTHING_MEASURED,
    ) -> None:
        wants_logprobs = self._request.sampling.logprobs is not None
        chunk = OutputChunk(
            text=self._pending_text,
            token_ids=tuple(self._pending_ids),
            logprobs=tuple(self._pending_logprobs) if wants_logprobs else None,
            finish_reason=reason,
            num_prompt_tokens=len(self._request.prompt_token_ids),
            num_output_tokens=self._num_tokens,
            error=error,
            embedding=embedding,
            num_cached_tokens=self.num_cached_tokens,
            prompt_nll=measured.prompt_nll,
            answer_nll=measured.answer_nll,
            answer_entropy=measured.answer_entropy,
        )
        self._pending_text, self._pending_ids, self._pending_logprobs = "", [], []
        self._on_chunk(chunk)

    def _describe(self, token: Sampled) -> TokenLogprob:
        assert token.logprob is not None
        top = tuple(self._logprob(token_id, value) for token_id, value in token.top)
        return self._logprob(token.token_id, token.logprob, top)

    def _logprob(self, token_id: int, value: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        raw = self._token_bytes.of(token_id)
        return TokenLogprob(raw.decode("utf-8", errors="replace"), token_id, value, tuple(raw), top)
