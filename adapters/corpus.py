"""Examples as token sequences that know which tokens are learned. Knows no batches and no loss.

A prompt is rendered by the very call that renders it at inference (`add_generation_prompt`), and what is learned
is what the model has to write after it: the assistant's tokens and the token that ends the turn.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from adapters.dataset import Complaints
from adapters.errors import DatasetError
from adapters.example import ChatExample, CompletionExample, Example, Message, PreferenceExample, opening_of

MAX_VALIDATION_EXAMPLES = 512


class Codec(Protocol):
    """The base's tokenizer and chat template."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, add_generation_prompt: bool = True
    ) -> list[int]: ...


@dataclass(frozen=True)
class TokenSequence:
    """`spans` are the half-open ranges of `tokens` that are learned."""

    tokens: list[int]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Corpus:
    """Tokenized sequences in flat arrays; a subset shares them.

    tokens: int32 [num_tokens]; trained: bool [num_tokens]; spans: int64 [num_sequences, 2], start and stop in
    `tokens`; lines: int32 [num_sequences], the line of the file a sequence comes from.
    """

    tokens: torch.Tensor
    trained: torch.Tensor
    spans: torch.Tensor
    lines: torch.Tensor
    num_truncated: int = 0

    def __len__(self) -> int:
        return self.spans.shape[0]

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each sequence, int64 [num_sequences]."""
        return self.spans[:, 1] - self.spans[:, 0]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_learned(self) -> torch.Tensor:
        """Tokens that a loss over each sequence sums, int64 [num_sequences]; a first token has nothing before it."""
        before = torch.cat([torch.zeros(1, dtype=torch.int64), self.trained.cumsum(0)])
        return before[self.spans[:, 1]] - before[self.spans[:, 0] + 1]

    def sequence(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their trained mask, both [length]; views of the shared arrays."""
        start, stop = self.spans[index].tolist()
        return self.tokens[start:stop], self.trained[start:stop]

    def first(self, count: int) -> Corpus:
        """The first `count` sequences, or all; an even number keeps pairs whole."""
        return self.subset(torch.arange(min(count, len(self))))

    def subset(self, indices: torch.Tensor) -> Corpus:
        """The sequences at `indices` (int64 [n]), in that order."""
        return Corpus(self.tokens, self.trained, self.spans[indices], self.lines[indices], self.num_truncated)


def build_corpus(
    examples: Iterable[Example | PreferenceExample],
    codec: Codec,
    *,
    max_length: int,
    param: str = "training_file",
    on_example: Callable[[], None] = lambda: None,
) -> Corpus:
    """Tokenize examples; those over `max_length` tokens lose their end and are counted.

    Preferences become pairs: sequence 2i is preferred to sequence 2i + 1.

    `on_example` is called once per example, so that a caller can yield the processor or stop.

    Raises:
        DatasetError: an example whose answer lies wholly behind `max_length`, or that the template refuses.
    """
    tokens, trained, lines = array("i"), bytearray(), array("i")
    bounds = array("q", [0])
    complaints = Complaints(param)
    num_truncated = 0
    for example in examples:
        on_example()
        try:
            sequences = tokenize(example, codec)
        except DatasetError as error:
            complaints.add(example.line, error.message)
            continue
        if any(sequence.spans[0][0] >= max_length for sequence in sequences):
            complaints.add(example.line, f"the prompt alone fills the model's {max_length} tokens")
            continue
        for sequence in sequences:
            num_truncated += len(sequence.tokens) > max_length
            tokens.extend(sequence.tokens[:max_length])
            trained.extend(_mask(sequence)[:max_length])
            bounds.append(len(tokens))
            lines.append(example.line)
    complaints.raise_any()
    edges = torch.frombuffer(bounds, dtype=torch.int64)
    return Corpus(
        tokens=torch.frombuffer(tokens, dtype=torch.int32),
        trained=torch.frombuffer(trained, dtype=torch.bool),
        spans=torch.stack([edges[:-1], edges[1:]], dim=1),
        lines=torch.frombuffer(lines, dtype=torch.int32),
        num_truncated=num_truncated,
    )


def text_corpus(texts: Iterable[str], codec: Codec, *, max_length: int) -> Corpus:
    """Plain texts, cut at `max_length` tokens, every token but the first learned; `lines` number the texts from 1."""
    encoded = [encode_prompt(codec, text)[:max_length] for text in texts]
    edges = torch.tensor([0, *map(len, encoded)]).cumsum(0)
    tokens = torch.tensor([token for ids in encoded for token in ids], dtype=torch.int32)
    return Corpus(
        tokens=tokens,
        trained=torch.ones(len(tokens), dtype=torch.bool),
        spans=torch.stack([edges[:-1], edges[1:]], dim=1),
        lines=torch.arange(1, len(encoded) + 1, dtype=torch.int32),
    )


def split_validation(corpus: Corpus, *, seed: int) -> tuple[Corpus, Corpus]:
    """Hold out a tenth of the examples (at least 4 but never more than a fifth, at most 512), by seed.

    Sequences of one example stay on one side.
    """
    lines = torch.unique(corpus.lines)
    count = min(max(len(lines) // 10, 4), MAX_VALIDATION_EXAMPLES, len(lines) // 5)
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed))
    held_out = torch.isin(corpus.lines, lines[order[:count]])
    return corpus.subset((~held_out).nonzero().squeeze(1)), corpus.subset(held_out.nonzero().squeeze(1))


def tokenize(example: Example | PreferenceExample, codec: Codec) -> list[TokenSequence]:
    """One sequence per example, or one per learned answer where the template rewrites earlier turns.

    A preference gives two: the preferred answer behind the prompt, then the other one.
    """
    if isinstance(example, CompletionExample):
        return [_tokenize_completion(example, codec)]
    if isinstance(example, PreferenceExample):
        pair = [_tokenize_chat(chat, codec) for chat in (example.preferred, example.non_preferred)]
        return [sequences[-1] for sequences in pair]
    return _tokenize_chat(example, codec)


def render_prompt(example: Example, codec: Codec) -> list[int]:
    """The prompt before the example's last answer, as the service renders it at inference."""
    if isinstance(example, CompletionExample):
        return encode_prompt(codec, example.prompt)
    return _render(codec, example.prompt, add_generation_prompt=True)


def render_opening(example: Example, codec: Codec) -> list[int]:
    """The prompt before the example's first answer, as the service renders a conversation's first request."""
    opening = opening_of(example)
    if isinstance(opening, str):
        return encode_prompt(codec, opening)
    return _render(codec, opening, add_generation_prompt=True)


def encode_prompt(codec: Codec, text: str) -> list[int]:
    """A legacy completion's prompt, with the tokenizer's own special tokens."""
    ids: list[int] = codec.tokenizer.encode(text)
    return ids


def _tokenize_completion(example: CompletionExample, codec: Codec) -> TokenSequence:
    prompt = encode_prompt(codec, example.prompt)
    answer = _encode_answer(codec, example.completion)
    return TokenSequence(prompt + answer, ((len(prompt), len(prompt) + len(answer)),))


def _tokenize_chat(example: ChatExample, codec: Codec) -> list[TokenSequence]:
    turns = []
    for index, message in enumerate(example.messages):
        if message.trained:
            prompt = _render(codec, example.messages[:index], add_generation_prompt=True)
            turns.append((prompt, _answer(codec, example.messages[: index + 1], prompt)))
    whole = turns[-1][0] + turns[-1][1]
    if all(whole[: len(prompt) + len(answer)] == prompt + answer for prompt, answer in turns):
        return [TokenSequence(whole, tuple((len(p), len(p) + len(a)) for p, a in turns))]
    return [TokenSequence(p + a, ((len(p), len(p) + len(a)),)) for p, a in turns]


def _answer(codec: Codec, messages: Sequence[Message], prompt: list[int]) -> list[int]:
    """What the model has to write after `prompt` for the last message, up to the end of its turn.

    The template's own rendering where it continues the prompt. Where it does not (it adds something to the prompt
    that the history lacks, or tokens merge across the border), the content itself and the end token.
    """
    rendered = _render(codec, messages, add_generation_prompt=False)
    if rendered[: len(prompt)] != prompt:
        return _encode_answer(codec, messages[-1].content)
    answer = rendered[len(prompt) :]
    ends = [index for index, token in enumerate(answer) if token in codec.eos_token_ids]
    return answer[: ends[-1] + 1] if ends else [*answer, _end_token(codec)]


def _encode_answer(codec: Codec, text: str) -> list[int]:
    return [*codec.tokenizer.encode(text, add_special_tokens=False), _end_token(codec)]


def _end_token(codec: Codec) -> int:
    own = codec.tokenizer.eos_token_id
    return own if own in codec.eos_token_ids else min(codec.eos_token_ids)


def _render(codec: Codec, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
    try:
        return codec.render_chat(
            [message.as_dict() for message in messages], add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template may raise anything: it is the model author's program
        raise DatasetError(f"the model's chat template refuses the messages: {error}") from error


def _mask(sequence: TokenSequence) -> bytearray:
    mask = bytearray(len(sequence.tokens))
    for start, stop in sequence.spans:
        mask[start:stop] = b"\x01" * (stop - start)
    return mask
