"""Which examples a step learns from, by seed and step number alone: nothing to save. Knows no examples."""

from __future__ import annotations

import torch

from adapters.recipe import steps_per_epoch


class DataCursor:
    """An epoch is one shuffle of all examples; its last batch may be smaller."""

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        self.steps_per_epoch = steps_per_epoch(num_examples, batch_size)
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._seed = seed
        self._epoch: tuple[int, list[int]] | None = None

    def batch(self, step: int) -> list[int]:
        """The examples of step number `step`, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            shuffle = torch.Generator().manual_seed((self._seed << 16) + epoch)
            self._epoch = epoch, torch.randperm(self._num_examples, generator=shuffle).tolist()
        start = position * self._batch_size
        return self._epoch[1][start : start + self._batch_size]
