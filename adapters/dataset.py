"""Training files as tenants write them: JSONL of one kind of example, read as a stream. Knows no tokens and no model.

Every complaint names its line; what a line may be is in `example.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from adapters.errors import DatasetError
from adapters.example import (
    MAX_LINE_BYTES,
    Example,
    PreferenceExample,
    parse_example,
    parse_preference,
)

MIN_EXAMPLES = 10
MAX_COMPLAINTS = 20
Parsed = TypeVar("Parsed", Example, PreferenceExample)


@dataclass(frozen=True)
class BadLine:
    """A line that is no example, and why."""

    line: int
    message: str


def read_examples(stream: BinaryIO, *, minimum: int = MIN_EXAMPLES, param: str = "training_file") -> Iterator[Example]:
    """Yield the examples of a JSONL stream, to be learned by imitation. Holds one line at a time.

    Raises:
        DatasetError: at the end, listing up to 20 bad lines; `invalid_n_examples` when there are too few.
            After the first bad line nothing more is yielded, the rest is only checked.
    """
    return _read(stream, parse_example, minimum, param)


def read_preferences(
    stream: BinaryIO, *, minimum: int = MIN_EXAMPLES, param: str = "training_file"
) -> Iterator[PreferenceExample]:
    """The same for pairs of answers."""
    return _read(stream, parse_preference, minimum, param)


def _read(stream: BinaryIO, parse: Callable[[int, bytes], Parsed], minimum: int, param: str) -> Iterator[Parsed]:
    complaints = Complaints(param)
    num_examples = 0
    for item in read_lines(stream, parse):
        if isinstance(item, BadLine):
            complaints.add(item.line, item.message)
            continue
        num_examples += 1
        if not complaints.lines:
            yield item
    complaints.raise_any()
    if num_examples < minimum:
        noun = "example" if num_examples == 1 else "examples"
        raise DatasetError(
            f"the file has {num_examples} {noun}, at least {minimum} are needed",
            code="invalid_n_examples",
            param=param,
        )


def read_lines(stream: BinaryIO, parse: Callable[[int, bytes], Parsed]) -> Iterator[Parsed | BadLine]:
    """Every line of a JSONL stream that is not blank, as an example or as what is wrong with it; never stops early.

    `parse` is `parse_example`, `parse_preference` or `parse_learned`.
    """
    kind: type[Parsed] | None = None
    for line, raw in _lines(stream):
        try:
            example = parse(line, raw)
            if kind is not None and not isinstance(example, kind):
                raise ValueError("chat examples and completion examples are mixed in one file")
        except (ValueError, RecursionError) as error:
            yield BadLine(line, str(error))
            continue
        kind = type(example)
        yield example


def examples_at(
    stream: BinaryIO, lines: Collection[int], parse: Callable[[int, bytes], Example] | None = None
) -> list[Example]:
    """The examples on these lines (1-based) of a stream that has been validated before."""
    wanted, parse = set(lines), parse or parse_example
    return [parse(line, raw) for line, raw in _lines(stream) if line in wanted]


def preferences_at(stream: BinaryIO, lines: Collection[int]) -> list[PreferenceExample]:
    """The same for pairs of answers."""
    wanted = set(lines)
    return [parse_preference(line, raw) for line, raw in _lines(stream) if line in wanted]


class Complaints:
    """What is wrong with a file, line by line; becomes one error."""

    def __init__(self, param: str) -> None:
        self.param = param
        self.lines: list[tuple[int, str]] = []
        self.num_more = 0

    def add(self, line: int, message: str) -> None:
        if len(self.lines) < MAX_COMPLAINTS:
            self.lines.append((line, message))
        else:
            self.num_more += 1

    def raise_any(self) -> None:
        """Raise a DatasetError about the first line that also lists the others; do nothing without complaints."""
        if not self.lines:
            return
        (line, message), *others = self.lines
        parts = [message, *(f"line {number}: {text}" for number, text in others)]
        if self.num_more:
            parts.append(f"and {self.num_more} more lines")
        raise DatasetError("; ".join(parts), line=line, param=self.param)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank. A line over MAX_LINE_BYTES comes shortened to one byte more than that."""
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if len(raw) > MAX_LINE_BYTES:
            rest = raw
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(MAX_LINE_BYTES)
        if raw.strip():
            yield number, raw
