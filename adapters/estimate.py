"""What a run will take: tokens, steps, seconds, peak memory, by arithmetic alone. Knows no model and measures nothing.

Tokens and steps are exact. Seconds need a `Pace`, measured on this base (`adapters.calibration`).

The peak of memory is that of the largest pack's backward, on top of the base. With h hidden, k key-value and f
feed-forward features, V words, and d bytes per activation, a pack of T tokens (P when its sequences are padded to the
longest), L of them learned, through n layers, with an adapter of A numbers, of R ranks a layer, takes

    n * (T * (8h + d * (3f + adapted + R)) + P * d * (2h + 2k))   what the layers keep for their gradients
    + 12 * L * V                                                  log-probabilities and two gradients, float32
    + A * (16 + d)                                                masters, gradients, two moments; their copies
    + d * (numbers of the largest weight)                         dequantized for one product

`adapted` are the inputs that adapted products keep: h for q/k/v together, for gate/up together and for o; f for down.
n counts from the lowest adapted layer. Where layers are recomputed they keep d * h * T each, and one keeps all of it.
The shape is that of a Llama; other bases are near it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import lcm
from typing import Any

from adapters.corpus import Corpus
from adapters.data_cursor import DataCursor
from adapters.lora_weights import BaseSignature, LoraSpec
from adapters.packing import bounded_slices
from adapters.recipe import TrainConfig, auto_probe_steps, num_steps, steps_per_epoch

NUM_RATES = 3
"""That a probe tries."""
_SIBLINGS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Products that share their leader's input."""
_KEPT_PER_SEQUENCE = 32
"""Prompt tokens that `kl_to_base` asks for (`adapters.supervised.MAX_KEPT`)."""


@dataclass(frozen=True)
class Pack:
    """Sequences that go through the base at once."""

    num_tokens: int
    num_padded: int
    num_learned: int


@dataclass(frozen=True)
class RunSize:
    """How much a run does, if it does not stop early. `steps` are optimizer steps; `tokens` those it learns from."""

    tokens: int
    steps: int
    evaluations: int
    evaluation_tokens: int
    """Of one evaluation."""
    probe_steps: int
    """Before the run, to choose a learning rate."""
    packs: tuple[Pack, ...]
    """Distinct ones of the first epoch."""

    @classmethod
    def of(cls, config: TrainConfig, train: Corpus, valid: Corpus, *, probes: bool = False) -> RunSize:
        paired = config.beta is not None
        examples = _examples(train, paired)
        steps = num_steps(config, len(examples))
        return cls(
            tokens=_num_tokens(config, examples, steps),
            steps=steps,
            evaluations=num_evaluations(config, steps, steps_per_epoch(len(examples), config.batch_size)),
            evaluation_tokens=valid.num_tokens,
            probe_steps=NUM_RATES * auto_probe_steps(steps) if probes else 0,
            packs=_packs(config, examples),
        )


@dataclass(frozen=True)
class Pace:
    """How fast a base learns on its device, as measured; seconds."""

    per_token: float
    """Forward and backward."""
    per_update: float
    """The optimizer's own part of a step."""
    per_scored_token: float
    """Forward alone, in an evaluation."""


@dataclass(frozen=True)
class Estimate:
    """Of a whole run. `seconds` are those of steps and evaluations; None: nothing is known of the pace yet."""

    tokens: int
    steps: int
    evaluations: int
    probe_steps: int
    peak_memory_bytes: int
    seconds: float | None = None
    seconds_per_step: float | None = None
    """Without evaluations."""

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Estimate:
        return cls(**values)


def estimate(size: RunSize, memory: int, pace: Pace | None = None, tokens_per_second: float | None = None) -> Estimate:
    """By a measured pace; else coarsely, by what earlier runs did of tokens in a second, evaluations included."""
    seconds = per_step = None
    if pace is not None:
        training = size.tokens * pace.per_token + size.steps * pace.per_update
        seconds = training + size.evaluations * size.evaluation_tokens * pace.per_scored_token
        per_step = training / size.steps
    elif tokens_per_second:
        probed = size.tokens * size.probe_steps / size.steps
        seconds = (size.tokens + probed) / tokens_per_second
    return Estimate(size.tokens, size.steps, size.evaluations, size.probe_steps, memory, seconds, per_step)


def num_evaluations(config: TrainConfig, steps: int, steps_per_epoch: int) -> int:
    """As `Trainer.evaluation_due` counts them: every `eval_every` steps, after each epoch and at the end."""
    every = config.eval_every
    regular = steps // every + steps // steps_per_epoch - steps // lcm(every, steps_per_epoch)
    return regular + (steps % every != 0 and steps % steps_per_epoch != 0)


def peak_memory_bytes(
    size: RunSize, spec: LoraSpec, base: BaseSignature, *, vocabulary: int, activation_bytes: int, recompute: bool
) -> int:
    """Beside the base itself; see the module."""
    shape = _Shape.of(base, spec)
    most = max(_pack_bytes(pack, shape, vocabulary, activation_bytes, recompute) for pack in size.packs)
    largest = max(module.in_features * module.out_features for module in base.modules.values())
    return most + shape.num_adapted * (16 + activation_bytes) + activation_bytes * largest


def _pack_bytes(pack: Pack, shape: _Shape, vocabulary: int, d: int, recompute: bool) -> int:
    per_token = 8 * shape.hidden + d * (3 * shape.ffn + shape.adapted_inputs + shape.ranks)
    layer = pack.num_tokens * per_token + pack.num_padded * d * (2 * shape.hidden + 2 * shape.kv)
    layers = shape.num_layers * layer
    if recompute:
        layers = shape.num_layers * pack.num_tokens * d * shape.hidden + layer
    return layers + 12 * pack.num_learned * vocabulary


@dataclass(frozen=True)
class _Shape:
    """Of the layers that gradients go through; `adapted_inputs` and `ranks` are the mean of a layer."""

    num_layers: int
    hidden: int
    kv: int
    ffn: int
    adapted_inputs: int
    ranks: int
    num_adapted: int

    @classmethod
    def of(cls, base: BaseSignature, spec: LoraSpec) -> _Shape:
        names = spec.matching(base)
        layers = {layer for name in base.modules if (layer := _layer(name)) is not None}
        adapted_layers = [layer for name in names if (layer := _layer(name)) is not None]
        lowest = min(adapted_layers, default=max(layers, default=0))
        num_layers = max(1, sum(layer >= lowest for layer in layers))
        inner = [(name, module) for name, module in base.modules.items() if _layer(name) is not None]
        inputs = [module.in_features for _, module in inner] or [m.in_features for m in base.modules.values()]
        hidden = max(set(inputs), key=lambda width: (inputs.count(width), -width))
        kv = [module.out_features for name, module in inner if name.endswith("k_proj")]
        chosen = set(names)
        leaders = [name for name in names if _leader(name) == name or _leader(name) not in chosen]
        return cls(
            num_layers=num_layers,
            hidden=hidden,
            kv=kv[0] if kv else hidden,
            ffn=max(inputs),
            adapted_inputs=sum(base.modules[name].in_features for name in leaders) // num_layers,
            ranks=sum(spec.rank_of(name) for name in names) // num_layers,
            num_adapted=sum(
                spec.rank_of(name) * (base.modules[name].in_features + base.modules[name].out_features)
                for name in names
            ),
        )


def _layer(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return None if found is None else int(found[1])


def _leader(name: str) -> str:
    head, _, last = name.rpartition(".")
    return f"{head}.{_SIBLINGS[last]}" if last in _SIBLINGS else name


_Example = tuple[list[int], int]
"""Lengths of an example's sequences (two of a pair), and how many of their tokens are learned."""


def _examples(corpus: Corpus, paired: bool) -> list[_Example]:
    lengths, learned = corpus.lengths.tolist(), corpus.num_learned.tolist()
    size = 2 if paired else 1
    starts = range(0, len(lengths), size)
    return [(lengths[start : start + size], sum(learned[start : start + size])) for start in starts]


def _num_tokens(config: TrainConfig, examples: list[_Example], steps: int) -> int:
    """Whole epochs see everything once; a run that ends within one sees the batches of the seed's order."""
    counts = [sum(lengths) for lengths, _ in examples]
    cursor = DataCursor(len(examples), config.batch_size, config.seed)
    epochs, rest = divmod(steps, cursor.steps_per_epoch)
    begun = range(epochs * cursor.steps_per_epoch, epochs * cursor.steps_per_epoch + rest)
    return epochs * sum(counts) + sum(counts[index] for step in begun for index in cursor.batch(step))


def _packs(config: TrainConfig, examples: list[_Example]) -> tuple[Pack, ...]:
    """As the trainer divides its batches. Learned tokens include the prompts' where `kl_to_base` asks for them."""
    cursor, found = DataCursor(len(examples), config.batch_size, config.seed), set()
    for step in range(cursor.steps_per_epoch):
        batch = cursor.batch(step)
        widths = [len(examples[index][0]) * max(examples[index][0]) for index in batch]
        for part in bounded_slices(widths, config.max_slice_tokens):
            chosen = [examples[batch[position]] for position in part]
            sequences = [length for lengths, _ in chosen for length in lengths]
            kept = _KEPT_PER_SEQUENCE * len(sequences) if config.kl_to_base else 0
            learned = sum(learned for _, learned in chosen) + kept
            found.add(Pack(sum(sequences), len(sequences) * max(sequences), learned))
    return tuple(found)
