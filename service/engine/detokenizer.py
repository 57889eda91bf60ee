"""Token ids -> text that is final: whole UTF-8 characters, nothing that may still become a stop string.

Knows one sequence's output and the tokenizer, nothing of batches.
"""

from __future__ import annotations

import codecs
from functools import lru_cache
from typing import Protocol

from transformers import PreTrainedTokenizerBase


class TokenBytes:
    """The bytes a single token stands for, so that characters split over tokens can be joined.

    `exact` says that a text is the concatenation of its tokens' bytes, which holds for byte-level BPE.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self.exact = _is_byte_level(tokenizer)
        self._byte_of = {c: b for b, c in _byte_alphabet().items()} if self.exact else None

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

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


class _Pieces(Protocol):
    """Token by token to whole characters."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class _BytePieces:
    """Byte-level BPE: the tokens' bytes through Python's incremental UTF-8 decoder."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if self._token_bytes.is_special(token_id):
            return ""
        return self._decoder.decode(self._token_bytes.of(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowPieces:
    """Any tokenizer: decode a sliding window twice and take the difference, as vLLM and TGI do.

    A window that ends in U+FFFD may be an unfinished character; it waits, but not for longer than one can be.
    """

    _LONGEST_CHARACTER = 6

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._prefix = self._read = 0

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        new = self._new_text()
        unfinished = new.endswith("\ufffd") and len(self._ids) - self._read < self._LONGEST_CHARACTER
        if not new or unfinished:
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return new

    def flush(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._prefix : self._read])
        return self._decode(self._ids[self._prefix :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class Detokenizer:
    """Feeds on one sequence's tokens and says what text may go out.

    `push` returns the text that became final. Once a stop string appears, `stopped` is True and nothing behind it
    comes out. `flush` returns the rest when the sequence ends for another reason.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        token_bytes: TokenBytes,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
    ) -> None:
        self._pieces: _Pieces = _BytePieces(token_bytes) if token_bytes.exact else _WindowPieces(tokenizer)
        self._stop = stop
        self._include_stop = include_stop
        self._text = ""  # decoded, not sent yet
        self.stopped = False

    def push(self, token_id: int) -> str:
        return self._advance(self._pieces.push(token_id))

    def flush(self) -> str:
        """The rest, incomplete characters as U+FFFD."""
        if self.stopped:
            return ""
        text = self._advance(self._pieces.flush())
        return text if self.stopped else text + self._send(len(self._text))

    def _advance(self, piece: str) -> str:
        if not piece or self.stopped:
            return ""
        self._text += piece
        found = [(at, len(s)) for s in self._stop if (at := self._text.find(s)) >= 0]
        if found:
            at, length = min(found)
            self.stopped = True
            return self._send(at + length if self._include_stop else at)
        return self._send(len(self._text) - self._held_back())

    def _send(self, until: int) -> str:
        text, self._text = self._text[:until], self._text[until:]
        return text

    def _held_back(self) -> int:
        """Length of the longest tail that a stop string starts with."""
        longest = 0
        for string in self._stop:
            for length in range(min(len(string) - 1, len(self._text)), longest, -1):
                if self._text.endswith(string[:length]):
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
