"""A job's files as training and validation sequences, and a few examples to compare models on.

Knows the files and the tokenizer, not the trainer.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from adapters.corpus import MAX_VALIDATION_EXAMPLES, Codec, Corpus, build_corpus, split_validation
from adapters.dataset import MIN_EXAMPLES, examples_at, preferences_at, read_examples, read_preferences
from adapters.example import Example, PreferenceExample
from service.files import Files
from service.job import JobSpec, Method

MAX_TRAIN_LENGTH = 8192
EVALUATION_PARAM = "evaluation.file"
BREATH_SECONDS = 1e-4
"""Tokenizing is pure Python: between two examples, threads that wait for the interpreter get it."""


@dataclass(frozen=True)
class TuningData:
    """`lines` of the corpora refer to the training file, or of `valid` to the validation file where there is one."""

    train: Corpus
    valid: Corpus
    num_left_out: int
    """Validation examples beyond what a run is evaluated on."""
    paired: bool = False
    """Sequences are pairs of a preferred and another answer."""

    @property
    def num_train(self) -> int:
        """Sequences, or pairs of them."""
        return len(self.train) // (2 if self.paired else 1)

    @property
    def num_valid(self) -> int:
        return len(self.valid) // (2 if self.paired else 1)

    def describe(self) -> str:
        noun = "pairs of answers" if self.paired else "sequences"
        parts = [f"Training on {self.num_train} {noun} ({self.train.num_tokens} tokens)"]
        parts.append(f"validating on {self.num_valid}")
        if self.num_left_out:
            parts.append(f"leaving out {self.num_left_out} more than the {MAX_VALIDATION_EXAMPLES} that are used")
        num_truncated = self.train.num_truncated
        if num_truncated:
            parts.append(f"{num_truncated} truncated at the model's length")
        return ", ".join(parts)


class Asked(Protocol):
    """A job, or what will be one."""

    @property
    def tenant_id(self) -> str: ...
    @property
    def spec(self) -> JobSpec: ...


class JobFiles:
    """Reads what one job names."""

    def __init__(self, files: Files, job: Asked, codec: Codec, max_length: int, check: Callable[[], None]) -> None:
        self._files = files
        self._job = job
        self._codec = codec
        self._max_length = min(max_length, MAX_TRAIN_LENGTH)
        self._check = check

    def load(self) -> TuningData:
        """Raises DatasetError about a file that cannot be trained on."""
        spec = self._job.spec
        if spec.evaluation.file is not None:
            self._evaluation_examples(spec.evaluation.file, 0)  # a mistake in it shall not show after the training
        corpus = self._corpus(spec.training_file, MIN_EXAMPLES, "training_file")
        if spec.validation_file is None:
            train, valid = split_validation(corpus, seed=spec.seed)
            return TuningData(train, valid, 0, self._paired)
        valid = self._corpus(spec.validation_file, 1, "validation_file")
        size = 2 if self._paired else 1
        num_valid = len(valid) // size
        chosen = _choose(num_valid, MAX_VALIDATION_EXAMPLES, spec.seed)
        sequences = (chosen[:, None] * size + torch.arange(size)).flatten()
        return TuningData(corpus, valid.subset(sequences), num_valid - len(chosen), self._paired)

    def evaluated(self, data: TuningData, count: int) -> list[Example]:
        """Examples to compare models on, chosen by seed: of the evaluation file, or else of the validation examples
        (of pairs, the preferred answers)."""
        spec = self._job.spec
        if spec.evaluation.file is not None:
            return self._evaluation_examples(spec.evaluation.file, count)
        return self._examples(spec.validation_file or spec.training_file, data.valid, count)

    def trained(self, data: TuningData, count: int) -> list[Example]:
        """Training examples, chosen by seed."""
        return self._examples(self._job.spec.training_file, data.train, count)

    def _evaluation_examples(self, file_id: str, count: int) -> list[Example]:
        """`count` of the file's examples, each equally likely (algorithm R); every line is checked."""
        draw = random.Random(self._job.spec.seed)
        kept: list[Example] = []
        with self._files.open(self._job.tenant_id, file_id) as stream:
            for index, example in enumerate(read_examples(stream, minimum=1, param=EVALUATION_PARAM)):
                self._breathe()
                if index < count:
                    kept.append(example)
                elif (place := draw.randint(0, index)) < count:
                    kept[place] = example
        return kept

    def _corpus(self, file_id: str, minimum: int, param: str) -> Corpus:
        with self._files.open(self._job.tenant_id, file_id) as stream:
            read = read_preferences if self._paired else read_examples
            examples: Iterator[Example | PreferenceExample] = read(stream, minimum=minimum, param=param)
            return build_corpus(
                examples, self._codec, max_length=self._max_length, param=param, on_example=self._breathe
            )

    def _examples(self, file_id: str, corpus: Corpus, count: int) -> list[Example]:
        lines = torch.unique(corpus.lines)
        chosen = lines[_choose(len(lines), count, self._job.spec.seed)].tolist()
        with self._files.open(self._job.tenant_id, file_id) as stream:
            if self._paired:
                return [pair.preferred for pair in preferences_at(stream, chosen)]
            return examples_at(stream, chosen)

    @property
    def _paired(self) -> bool:
        return self._job.spec.method is Method.DPO

    def _breathe(self) -> None:
        self._check()
        time.sleep(BREATH_SECONDS)


def _choose(total: int, count: int, seed: int) -> torch.Tensor:
    """`count` of `total` indices by seed, ascending."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values
