"""How a base's weights are held, as a word."""

from __future__ import annotations

from enum import StrEnum


class Quantization(StrEnum):
    """How the base's linear layers are held in memory."""

    NF4 = "nf4"
    INT8 = "int8"
    NONE = "none"
