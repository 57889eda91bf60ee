"""A job's phase before its adapter is stored: what its training prompts look like to the base, for the watch for drift.

The first turn of each training conversation, as the service renders it for a first request, is embedded by the base
with the adapter off; `adapters.drift` makes the reference of that. Knows no monitor and no traffic. The job does not
fail when only this cannot be done: then the adapter has no reference, and its prompts are not watched.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from adapters.corpus import render_opening
from adapters.drift.build import MIN_PROMPTS, build_reference
from adapters.drift.reference import DriftReference
from adapters.errors import AdapterError, TooFewPromptsError
from adapters.example import Example, opening_of
from service.background_generation import Submitting, probe_prompts
from service.drift_prompt import drift_basis, probe_tokens
from service.engine.base_model import BaseModel
from service.engine.errors import EngineError
from service.job import Claim, EventLevel
from service.tuning_data import BREATH_SECONDS, JobFiles, TuningData
from service.tuning_evaluation import Say

MAX_PROMPTS = 1024
MAX_EXAMPLES = 4 * MAX_PROMPTS
"""Training examples that are looked through for different prompts."""


class ReferenceWorkplace(Protocol):
    """The part of `TuningServices` that is needed here."""

    @property
    def base(self) -> BaseModel: ...
    @property
    def engine(self) -> Submitting: ...
    @property
    def drift_run_length(self) -> float | None: ...


@dataclass(frozen=True)
class ReferenceFacts:
    """As the version keeps them: how many prompts it is made of, its promise, the seconds that it took."""

    num_prompts: int
    run_length: float
    embedding_seconds: float
    calibration_seconds: float


@dataclass(frozen=True)
class MadeReference:
    """For the adapter's directory, and for its version."""

    reference: DriftReference
    facts: ReferenceFacts

    def as_dict(self) -> dict[str, Any]:
        return asdict(self.facts)

    def message(self) -> str:
        facts = self.facts
        return (
            f"Drift reference made of {facts.num_prompts} training prompts in"
            f" {facts.embedding_seconds + facts.calibration_seconds:.1f} s ({facts.embedding_seconds:.1f} s of them"
            f" embedding): without drift, one false alarm in {facts.run_length:g} prompts is expected"
        )


class TuningReference:
    """The reference of one claimed job's adapter."""

    def __init__(self, services: ReferenceWorkplace, claim: Claim, check: Callable[[], None], say: Say) -> None:
        self._services = services
        self._tenant_id = claim.job.tenant_id
        self._seed = claim.job.spec.seed
        self._check = check
        self._say = say

    def make(self, files: JobFiles, data: TuningData) -> MadeReference | None:
        """None, with an event that says why, where there is none; no word where none is wanted."""
        run_length = self._services.drift_run_length
        if run_length is None:
            return None
        try:
            made = self._make(files.trained(data, MAX_EXAMPLES), run_length)
        except TooFewPromptsError as error:
            self._say(f"No drift reference: {error.message}. The prompts of this model will not be watched for drift.")
            return None
        except (AdapterError, EngineError) as error:
            self._say(f"The drift reference could not be made: {error.message}", EventLevel.WARN)
            return None
        self._say(made.message(), data=made.as_dict())
        return made

    def _make(self, examples: Sequence[Example], run_length: float) -> MadeReference:
        start = time.monotonic()
        lengths = self._prompts(examples)
        prompts = list(lengths)
        if len(prompts) < MIN_PROMPTS:
            raise TooFewPromptsError(f"{len(prompts)} different prompts are too few, {MIN_PROMPTS} are needed")
        chunks = probe_prompts(self._services.engine, f"{self._tenant_id}/drift", prompts, self._check)
        embedded_at = time.monotonic()
        vectors = np.stack([chunk.embedding for chunk in chunks if chunk.embedding is not None])
        scalars = {"prompt_length": np.array(list(lengths.values()), dtype=np.float64)}
        nlls = [chunk.prompt_nll for chunk in chunks if chunk.prompt_nll is not None]
        if len(nlls) == len(prompts):  # else the base cannot tell, or not of every prompt
            scalars["prompt_nll"] = np.array(nlls, dtype=np.float64)
        reference = build_reference(
            vectors,
            scalars,
            basis=drift_basis(self._services.base),
            run_length=run_length,
            seed=self._seed,
            check=self._check,
        )
        seconds = (embedded_at - start, time.monotonic() - embedded_at)
        return MadeReference(reference, ReferenceFacts(len(prompts), run_length, *(round(s, 3) for s in seconds)))

    def _prompts(self, examples: Sequence[Example]) -> dict[tuple[int, ...], int]:
        """First turns as they are probed, each once, with their lengths before the cut; at most `MAX_PROMPTS`, chosen
        by seed."""
        different = list({opening_of(example): example for example in examples}.values())
        count = min(MAX_PROMPTS, len(different))
        chosen = sorted(random.Random(self._seed).sample(range(len(different)), count))
        prompts: dict[tuple[int, ...], int] = {}
        for index in chosen:
            self._check()
            time.sleep(BREATH_SECONDS)  # tokenizing is pure Python
            prompt = tuple(render_opening(different[index], self._services.base))
            if len(prompt) > 1:  # one token has no surprise
                prompts.setdefault(probe_tokens(prompt), len(prompt))
        return prompts
