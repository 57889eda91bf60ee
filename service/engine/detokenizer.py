"""Token ids -> text that is final: whole UTF-8 characters, nothing that may still become a stop string.

Knows one sequence's output and the tokenizer, nothing of batches.
"""

from __future__ import annotations

from functools import lru_cache

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class TokenBytes:
    """The bytes a single token stands for, so that clients can join characters split over tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._byte_of = {c: b for b, c in _byte_alphabet().items()} if _is_byte_level(tokenizer) else None

    def of(self, token_id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):
            return b""
        if token_id in self._special:
            return piece.encode()
        if self._byte_of is not None and all(c in self._byte_of for c in piece):
            return bytes(self._byte_of[c] for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


class Detokenizer:
    """Feeds on one sequence's tokens and says what text may go out.

    `push` returns the text that became final. Once a stop string appears, `stopped` is True and nothing behind it
    comes out. `flush` returns the rest when the sequence ends for another reason.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = (), include_stop: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._include_stop = include_stop
        self._ids: list[int] = []
        self._decoded = ""
        self._sent = 0
        self.stopped = False

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token_id)
        if not piece or self.stopped:
            return ""
        searched_from = max(0, len(self._decoded) - max((len(s) for s in self._stop), default=0))
        self._decoded += piece
        found = [(at, s) for s in self._stop if (at := self._decoded.find(s, max(self._sent, searched_from))) >= 0]
        if found:
            at, string = min(found)
            self.stopped = True
            return self._send(at + len(string) if self._include_stop else at)
        return self._send(len(self._decoded) - self._held_back())

    def flush(self) -> str:
        """The rest, incomplete characters as U+FFFD."""
        if self.stopped:
            return ""
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if whole.startswith(self._decoded):
            self._decoded = whole
        return self._send(len(self._decoded))

    def _send(self, until: int) -> str:
        text = self._decoded[self._sent : until]
        self._sent = max(self._sent, until)
        return text

    def _held_back(self) -> int:
        """Length of the longest tail that a stop string starts with."""
        tail = self._decoded[self._sent :]
        longest = 0
        for string in self._stop:
            for length in range(min(len(string) - 1, len(tail)), longest, -1):
                if tail.endswith(string[:length]):
                    longest = length
                    break
        return longest


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins: printable Latin-1 is itself, the other bytes count up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {b: chr(b) for b in printable}
    others = (b for b in range(256) if b not in alphabet)
    alphabet.update({b: chr(0x100 + n) for n, b in enumerate(others)})
    return alphabet
