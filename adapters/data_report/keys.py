"""Three 64-bit keys and a line number for each example: what exact comparisons of whole files rest on.

28 bytes an example, whatever its length; a collision among ten million examples has a chance of 3 in a million.
"""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from adapters.data_report.row import Row

Keys = NDArray[np.uint64]
Lines = NDArray[np.uint32]


class KeyColumns:
    def __init__(self) -> None:
        self._exact, self._input, self._answer = array("Q"), array("Q"), array("Q")
        self._lines = array("I")

    def add(self, row: Row) -> None:
        self._exact.append(row.exact_key)
        self._input.append(row.input_key)
        self._answer.append(row.answer_key)
        self._lines.append(row.line)

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def exact(self) -> Keys:
        return np.array(self._exact, dtype=np.uint64)

    @property
    def input(self) -> Keys:
        return np.array(self._input, dtype=np.uint64)

    @property
    def answer(self) -> Keys:
        return np.array(self._answer, dtype=np.uint64)

    @property
    def lines(self) -> Lines:
        return np.array(self._lines, dtype=np.uint32)


def repeated(keys: Keys) -> NDArray[np.bool_]:
    """Which of the keys stood earlier in the file already: bool [n]."""
    later = np.ones(len(keys), dtype=np.bool_)
    later[np.unique(keys, return_index=True)[1]] = False
    return later
