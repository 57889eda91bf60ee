"""`python -m bench.dirty_data --data DIR`: plant faults into a clean data set, and count which ones the report finds.

DIR holds `train.jsonl`, and perhaps `validation.jsonl`, with rows of `input` and `output`. The clean file is reported
on first: what is found there already is shown apart (`clean`), and is not counted as false. `false` are lines that only
the dirty file's report names under a fault's code, and that no fault was planted on (nor is the twin of one).
"""

from __future__ import annotations

import argparse
import io
import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from adapters.data_report import Base, DataReport, Limits, make_report
from adapters.data_report.outputs import OutputKind
from adapters.data_report.row import plain
from bench.faults import FAULTS, JSON_FAULTS, LABEL_FAULTS, Fault, Pair, as_line

ALL_LINES = Limits(max_lines=1_000_000)
MIN_LETTERS = 15
OVERLAP_CODES = ("validation_overlap",)
NEAR_OVERLAP_CODES = ("validation_near_overlap",)


_Line = tuple[bytes, str | None, int | None]
"""What stands there, the fault that was planted, the clean row that it is."""


@dataclass
class Dirty:
    """A file with faults. Lines are 1-based; `twins` are the clean lines with an input that a planted one copies."""

    lines: list[bytes] = field(default_factory=list)
    planted: dict[str, set[int]] = field(default_factory=dict)
    twins: set[int] = field(default_factory=set)
    clean_line: dict[int, int] = field(default_factory=dict)
    """Line in this file -> line in the clean one, where the row is untouched."""

    @property
    def all_planted(self) -> set[int]:
        return set().union(*self.planted.values())


@dataclass(frozen=True)
class Score:
    name: str
    num_planted: int
    num_found: int
    num_false: int
    num_clean: int
    """What the same codes name in the clean file."""


def plant(clean: Sequence[Pair], faults: Sequence[Fault], count: int, seed: int) -> Dirty:
    """`count` of each fault at random places of the file, in random order."""
    rng = random.Random(seed)
    usable = [index for index, pair in enumerate(clean) if sum(map(str.isalpha, pair[0])) >= MIN_LETTERS]
    chosen = iter(rng.sample(usable, count * len(faults)))
    rows: list[_Line] = [(as_line(pair), None, index) for index, pair in enumerate(clean)]
    added: list[_Line] = []
    copied: set[str] = set()
    for fault in faults:
        for _ in range(count):
            index = next(chosen)
            line = _faulty(fault, clean, index, rng)
            if fault.adds:
                added.append((line, fault.name, None))
                copied.add(plain(clean[index][0]))
            else:
                rows[index] = (line, fault.name, None)
    rng.shuffle(added)
    for row in added:  # behind what they copy, so that it is the copy that is named
        rows.insert(rng.randint(len(clean), len(rows)), row)
    dirty = Dirty()
    for number, (line, name, clean_index) in enumerate(rows, 1):
        dirty.lines.append(line)
        if name is not None:
            dirty.planted.setdefault(name, set()).add(number)
        elif clean_index is not None:
            dirty.clean_line[number] = clean_index + 1
            if plain(clean[clean_index][0]) in copied:
                dirty.twins.add(number)
    return dirty


def _faulty(fault: Fault, clean: Sequence[Pair], index: int, rng: random.Random) -> bytes:
    if fault.broken is not None:
        return fault.broken(clean[index], rng)
    assert fault.make is not None
    return as_line(fault.make(clean[index], rng, clean))


def score(faults: Sequence[Fault], dirty: Dirty, report: DataReport, clean: DataReport) -> list[Score]:
    """One for each fault, over the findings of the training file."""
    before, now = _lines_by_code(clean), _lines_by_code(report)
    scores = []
    for fault in faults:
        named = set().union(*(now.get(code, set()) for code in fault.codes))
        before_too: set[int] = set().union(*(before.get(code, set()) for code in fault.codes))
        known = before_too.union(*(before.get(code, set()) for code in fault.kin))
        planted = dirty.planted.get(fault.name, set())
        innocent = named - dirty.all_planted - dirty.twins
        false = {line for line in innocent if dirty.clean_line[line] not in known}
        scores.append(Score(fault.name, len(planted), len(planted & named), len(false), len(before_too)))
    return scores


def score_overlap(
    train: Sequence[Pair], valid: Sequence[Pair], count: int, seed: int, base: Base | None
) -> list[Score]:
    """Training rows put into the validation file, as they are and with a letter changed."""
    rng = random.Random(seed)
    near = next(fault for fault in FAULTS if fault.name == "near duplicate")
    usable = [index for index, pair in enumerate(train) if sum(map(str.isalpha, pair[0])) >= MIN_LETTERS]
    chosen = rng.sample(usable, 2 * count)
    lines = [as_line(pair) for pair in valid]
    lines += [as_line(train[index]) for index in chosen[:count]]
    lines += [_faulty(near, train, index, rng) for index in chosen[count:]]
    training = source(map(as_line, train))
    clean = _lines_by_code(_report(training, source(map(as_line, valid)), base), "validation_file")
    found = _lines_by_code(_report(training, source(lines), base), "validation_file")
    first = len(valid) + 1
    copies, near_copies = set(range(first, first + count)), set(range(first + count, first + 2 * count))
    either = OVERLAP_CODES + NEAR_OVERLAP_CODES  # other capitals and marks are the same input
    return [
        _overlap("validation overlap", copies, OVERLAP_CODES, found, clean, near_copies),
        _overlap("near validation overlap", near_copies, either, found, clean, copies),
    ]


def _overlap(
    name: str,
    planted: set[int],
    codes: Iterable[str],
    found: Mapping[str, set[int]],
    clean: Mapping[str, set[int]],
    others: set[int],
) -> Score:
    named: set[int] = set().union(*(found.get(code, set()) for code in codes))
    known: set[int] = set().union(*(clean.get(code, set()) for code in codes))
    return Score(name, len(planted), len(planted & named), len(named - planted - others - known), len(known))


def faults_for(pairs: Sequence[Pair], base: Base | None) -> tuple[tuple[Fault, ...], DataReport]:
    """What can be planted into a file of this kind, and the report on it as it is."""
    clean = _report(source(map(as_line, pairs)), None, base)
    kind = clean.statistics["training"]["outputs"]
    special = {OutputKind.LABELS.value: LABEL_FAULTS, OutputKind.JSON.value: JSON_FAULTS}.get(kind, ())
    with_tokens = ("truncated", "prompt_too_long")
    return tuple(fault for fault in (*FAULTS, *special) if base is not None or fault.codes[0] not in with_tokens), clean


def measure(
    train: Sequence[Pair], valid: Sequence[Pair], *, count: int, seed: int, base: Base | None
) -> tuple[list[Score], float]:
    """The scores, and the seconds of one core that the report on the dirty file took."""
    faults, clean = faults_for(train, base)
    dirty = plant(train, faults, count, seed)
    started = time.process_time()
    report = _report(source(dirty.lines), None, base)
    seconds = time.process_time() - started
    scores = score(faults, dirty, report, clean)
    if valid:
        scores += score_overlap(train, valid, count, seed, base)
    return scores, seconds


def source(lines: Iterable[bytes]) -> Callable[[], io.BytesIO]:
    content = b"\n".join(lines) + b"\n"
    return partial(io.BytesIO, content)


def _report(
    training: Callable[[], io.BytesIO], validation: Callable[[], io.BytesIO] | None, base: Base | None
) -> DataReport:
    return make_report(training, validation, base=base, limits=ALL_LINES)


def _lines_by_code(report: DataReport, file: str = "training_file") -> dict[str, set[int]]:
    return {finding.code: set(finding.lines) for finding in report.findings if finding.file == file}


def _read(path: Path) -> list[Pair]:
    if not path.is_file():
        return []
    rows: Iterable[Any] = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(row["input"], row["output"]) for row in rows]


def _show(name: str, scores: Sequence[Score], num_rows: int, seconds: float, console: Console) -> None:
    table = Table(
        "fault", "planted", "found", "false", "clean", title=f"{name}: {num_rows} rows, {seconds:.1f} s of one core"
    )
    for one in scores:
        missed = one.num_found < one.num_planted
        cells = (one.name, *map(str, (one.num_planted, one.num_found, one.num_false, one.num_clean)))
        table.add_row(*cells, style="red" if missed or one.num_false else None)
    total = [sum(column) for column in zip(*((s.num_planted, s.num_found, s.num_false) for s in scores), strict=True)]
    table.add_row("all", *map(str, total), "", style="bold")
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    from service.config import BUNDLED_BASE
    from service.engine.text_base import load_text_base

    parser = argparse.ArgumentParser(prog="python -m bench.dirty_data", description="What a data report finds.")
    parser.add_argument("--data", type=Path, action="append", required=True, metavar="DIR", help="may be given again")
    parser.add_argument("--count", type=int, default=25, help="how many of each fault (25)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--base", default=str(BUNDLED_BASE), help="model to count tokens for")
    options = parser.parse_args(arguments)
    text_base = load_text_base(options.base)
    base = Base(text_base, text_base.max_model_len, text_base.added_tokens)
    for directory in options.data:
        train, valid = _read(directory / "train.jsonl"), _read(directory / "validation.jsonl")
        scores, seconds = measure(train, valid, count=options.count, seed=options.seed, base=base)
        _show(directory.name, scores, len(train), seconds, Console())


if __name__ == "__main__":
    main()
