"""The tokens of one step in the order in which the base computes them. Knows places, no tensors and no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from service.engine.kv_cache import Row
from service.engine.plan import Work
from service.engine.residency import Residency
from service.engine.step_attention import PrefillChunk


@dataclass
class StepBatch:
    """Prefill chunks first, then one token per decoding sequence from `decode_start` on.

    tokens, positions, rows, slots: each token's id, position, cache row and adapter slot (None: the base);
    sampled: the tokens whose logits are wanted.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    slots: list[int | None] = field(default_factory=list)
    chunks: list[PrefillChunk] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    decode_start: int = 0

    @classmethod
    def of(cls, prefills: Sequence[Work], decodes: Sequence[Work], residency: Residency) -> StepBatch:
        batch = cls()
        for work in (*prefills, *decodes):
            batch._add(work, residency)
        batch.decode_start = len(batch.tokens) - len(decodes)
        return batch

    @property
    def sampled_slots(self) -> list[int | None]:
        return [self.slots[at] for at in self.sampled]

    @property
    def logits_to_keep(self) -> list[int]:
        """The base computes at least one row of logits."""
        return self.sampled or [0]

    def _add(self, work: Work, residency: Residency) -> None:
        sequence, place = work.sequence, residency[work.sequence]
        first, start = sequence.num_computed, len(self.tokens)
        span = range(first, first + work.num_tokens)
        self.tokens += [sequence.token_at(position) for position in span]
        self.positions += span
        self.rows += [place.row] * work.num_tokens
        self.slots += [place.slot] * work.num_tokens
        if work.is_prefill:
            self.chunks.append(PrefillChunk(start, len(self.tokens), place.row, first))
        if work.samples:
            self.sampled.append(len(self.tokens) - 1)
