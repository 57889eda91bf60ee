"""Examples that are almost the same as an earlier one. Knows texts of one kind of file; no keys and no labels.

Candidates come from locality-sensitive hashing of MinHash signatures (Broder 1997; by rensa, in Rust); each is then
compared exactly: the Jaccard similarity of the sets of three-character pieces, of inputs and of answers apart, so that
a long common context hides no difference of the answers. Short and structured answers must be equal, and so must all
numbers. Pieces that most inputs share (a prompt's frame) do not count.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from rensa import RMinHash, RMinHashLSH

from adapters.data_report.hits import Limits
from adapters.data_report.outputs import could_be_label
from adapters.data_report.row import Row, plain

MIN_SIMILARITY = 0.8
"""Of the inputs, and of the answers where these are not equal."""

PIECE = 3
MIN_PIECES = 8
ONE_LETTER = 2 * PIECE
"""Pieces that one wrong letter replaces: in a short text these are more than a fifth."""

NUM_PERMUTATIONS, NUM_BANDS = 120, 20
"""A pair of similarity s becomes a candidate with probability 1 - (1 - s^6)^20: 0.92 at 0.7, 0.998 at 0.8."""

MAX_CANDIDATES = 16
MAX_CHARACTERS = 4000
FRAME_SAMPLE = 256
FRAME_SHARE = 0.5
SEED = 1

_NUMBER = re.compile(r"\d+")


class _Kept(NamedTuple):
    line: int
    exact_key: int
    question: str
    answer: str
    numbers: tuple[str, ...]


class NearDuplicates:
    """An index that grows row by row until its memory is used up; then rows are still compared with what is in it."""

    def __init__(self, limits: Limits) -> None:
        self._room = limits.max_compared_characters
        self._index = RMinHashLSH(threshold=MIN_SIMILARITY, num_perm=NUM_PERMUTATIONS, num_bands=NUM_BANDS)
        self._kept: list[_Kept] = []
        self._frame: frozenset[str] | None = None
        self._first: list[_Kept] = []
        self._seen: set[int] = set()

    def add(self, row: Row) -> list[tuple[int, int]]:
        """Pairs (line, earlier line) that came to light; the first rows' come late, when the frame is known."""
        kept = _kept(row)
        if self._frame is not None:
            return self._enter(kept)
        self._first.append(kept)
        return self.settle() if len(self._first) == FRAME_SAMPLE else []

    def settle(self) -> list[tuple[int, int]]:
        """Learn the frame from the rows so far. To be called at the end of the file."""
        if self._frame is not None:
            return []
        in_how_many = Counter(piece for kept in self._first for piece in _pieces(kept.question))
        most = max(2, FRAME_SHARE * len(self._first))
        self._frame = frozenset(piece for piece, count in in_how_many.items() if count > most)
        waiting, self._first = self._first, []
        return [pair for kept in waiting for pair in self._enter(kept)]

    def twin(self, row: Row) -> int | None:
        """The line of an indexed example that this row of another file almost equals."""
        kept = _kept(row)
        signature = self._signature(kept)
        return None if signature is None else self._match(kept, signature)

    def _enter(self, kept: _Kept) -> list[tuple[int, int]]:
        signature = self._signature(kept)
        if signature is None or kept.exact_key in self._seen:
            return []  # a copy is told of as such
        self._seen.add(kept.exact_key)
        earlier = self._match(kept, signature)
        self._room -= len(kept.question) + len(kept.answer)
        if self._room >= 0:
            self._index.insert(len(self._kept), signature)
            self._kept.append(kept)
        return [] if earlier is None else [(kept.line, earlier)]

    def _signature(self, kept: _Kept) -> RMinHash | None:
        pieces = self._own_pieces(kept.question)
        if len(pieces) < MIN_PIECES:
            return None
        signature = RMinHash(num_perm=NUM_PERMUTATIONS, seed=SEED)
        signature.update([*pieces, *("\x1f" + piece for piece in _pieces(kept.answer))])
        return signature

    def _match(self, kept: _Kept, signature: RMinHash) -> int | None:
        """The earliest that is similar enough, not the same byte for byte: those are told of apart."""
        candidates = [self._kept[index] for index in sorted(self._index.query(signature))]
        possible = [other for other in candidates if _may_be_similar(kept, other) and _same_answer(kept, other)]
        own = self._own_pieces(kept.question)
        for other in possible[:MAX_CANDIDATES]:
            if _alike(own, self._own_pieces(other.question)):
                line: int = other.line
                return line
        return None

    def _own_pieces(self, text: str) -> set[str]:
        assert self._frame is not None
        return _pieces(text) - self._frame


def _alike(one: set[str], other: set[str]) -> bool:
    return len(one ^ other) <= ONE_LETTER or jaccard(one, other) >= MIN_SIMILARITY


def jaccard(one: set[str], other: set[str]) -> float:
    """Common elements by all elements."""
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def _kept(row: Row) -> _Kept:
    question, answer = plain(row.question)[:MAX_CHARACTERS], plain(row.answer)[:MAX_CHARACTERS]
    return _Kept(row.line, row.exact_key, question, answer, tuple(_NUMBER.findall(question)))


def _pieces(text: str) -> set[str]:
    return {text[start : start + PIECE] for start in range(max(1, len(text) - PIECE + 1))}


def _may_be_similar(one: _Kept, other: _Kept) -> bool:
    """Cheap and necessary: what differs much in length differs."""
    if one.exact_key == other.exact_key or one.numbers != other.numbers:
        return False
    short, long = sorted((len(one.question), len(other.question)))
    return short >= MIN_SIMILARITY * long * 0.8


def _same_answer(one: _Kept, other: _Kept) -> bool:
    if one.answer == other.answer:
        return True
    if could_be_label(one.answer) or one.answer.startswith(("{", "[")):
        return False
    return jaccard(_pieces(one.answer), _pieces(other.answer)) >= MIN_SIMILARITY
