"""Several runs in one forward: each gets the bits it would get alone, and nobody pays for another's failure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.lora import BatchedLoraLinear
from adapters.lora_weights import LoraSpec
from adapters.objective import PackResult
from adapters.packed_model import AskedRows
from adapters.recipe import TrainConfig
from adapters.segment_routing import SegmentRouting
from adapters.shared_forward import SharedForward
from adapters.trainable import TrainableLora, TrainRouting
from adapters.trainer import Trainer
from service.engine.base_model import BaseModel, load_base_model
from tests.adapters.company import Witness, at_once, steps
from tests.adapters.conftest import GraftedBase, TemplateCodec
from tests.adapters.corpora import CONFIG, SPEC, bits, chats, make_trainer, pairs

CPU = torch.device("cpu")
NUM_STEPS = 3
ATTENTION = ("q_proj", "v_proj", "o_proj")

Make = Callable[[SharedForward | None], list[Trainer]]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who travelled together does so again on a busy machine, too."""
    monkeypatch.setattr("adapters.turns.SHORTEST_PATIENCE", 10.0)
    monkeypatch.setattr("adapters.turns.LONGEST_PATIENCE", 10.0)


@pytest.fixture(scope="module", params=["nf4", "none", pytest.param("int8", marks=pytest.mark.slow)])
def bfloat16_base(request: pytest.FixtureRequest, tiny_llama_dir: Path) -> BaseModel:
    return load_base_model(str(tiny_llama_dir), quantization=request.param, device="cpu", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> BaseModel:
    return load_base_model(str(tiny_llama_dir), quantization="nf4", device="cpu")


def _trainer(
    base: BaseModel,
    codec: TemplateCodec,
    shared: SharedForward | None,
    config: TrainConfig = CONFIG,
    spec: LoraSpec = SPEC,
) -> Trainer:
    make = pairs if config.beta is not None else chats
    train, valid = make(codec, 12, seed=config.seed), make(codec, 3, seed=config.seed + 100)
    adapter = TrainableLora(spec, base.signature, seed=config.seed, device=CPU)
    return Trainer(base.model, adapter, train, valid, config, shared)


def _alike(base: BaseModel, codec: TemplateCodec, number: int = 3) -> Make:
    config = replace(CONFIG, batch_size=2, max_slice_tokens=2048)
    return lambda shared: [_trainer(base, codec, shared, replace(config, seed=seed)) for seed in range(number)]


def _motley(base: BaseModel, codec: TemplateCodec) -> Make:
    """Of different ranks, modules, layers, data, batch sizes and objectives, with dropout and without."""
    runs = [
        (replace(CONFIG, max_slice_tokens=2048), SPEC),
        (replace(CONFIG, seed=1, batch_size=2), LoraSpec(r=16, lora_alpha=16, target_modules=ATTENTION)),
        (replace(CONFIG, seed=2, recompute_layers=True), LoraSpec(r=3, lora_alpha=3, lora_dropout=0.3)),
        (replace(CONFIG, seed=3, beta=0.2), LoraSpec(r=8, lora_alpha=8, target_modules=("down_proj", "lm_head"))),
        (replace(CONFIG, seed=4, kl_to_base=0.5, batch_size=1), LoraSpec(r=2, lora_alpha=4, layers_to_transform=(1,))),
    ]
    return lambda shared: [_trainer(base, codec, shared, config, spec) for config, spec in runs]


def _bits_alone(make: Make) -> list[list[bytes]]:
    trainers = make(None)
    for trainer in trainers:
        steps(trainer, NUM_STEPS)()
    return [bits(trainer) for trainer in trainers]


@pytest.mark.slow
def test_every_run_in_company_learns_the_very_bits_that_it_learns_alone(
    bfloat16_base: BaseModel, codec: TemplateCodec
) -> None:
    make = _motley(bfloat16_base, codec)
    witness = Witness(SharedForward(bfloat16_base.model, CPU))
    trainers = make(witness.shared)
    assert at_once([steps(trainer, NUM_STEPS) for trainer in trainers]) == [None] * len(trainers)
    assert max(witness.sizes) >= 3, "they did not travel together"
    assert [bits(trainer) for trainer in trainers] == _bits_alone(make)
    assert len({tuple(bits(trainer)) for trainer in trainers}) == len(trainers)


@pytest.mark.slow
def test_on_a_float32_base_runs_only_take_turns_and_keep_their_bits_too(
    grafted: GraftedBase, codec: TemplateCodec
) -> None:
    def make(shared: SharedForward | None) -> list[Trainer]:
        configs = [replace(CONFIG, seed=seed) for seed in range(3)]
        return [make_trainer(grafted, chats(codec, 12), chats(codec, 3), config, shared=shared) for config in configs]

    witness = Witness(SharedForward(grafted.model, CPU))
    trainers = make(witness.shared)
    assert at_once([steps(trainer, NUM_STEPS) for trainer in trainers]) == [None] * 3
    assert set(witness.sizes) == {1}
    assert [bits(trainer) for trainer in trainers] == _bits_alone(make)


@pytest.mark.slow
def test_a_run_that_fails_between_forward_and_backward_holds_nobody_up(base: BaseModel, codec: TemplateCodec) -> None:
    make = _alike(base, codec)
    witness = Witness(SharedForward(base.model, CPU))
    trainers = make(witness.shared)
    failing = trainers[0]

    class Broken:
        """The objective, until its third pack."""

        num_calls = 0

        def __init__(self, objective: object) -> None:
            self._objective = objective

        def __getattr__(self, name: str) -> object:
            return getattr(self._objective, name)

        def __len__(self) -> int:
            return len(self._objective)  # type: ignore[arg-type]

        def __call__(self, *args: object) -> PackResult:
            self.num_calls += 1
            result: PackResult = self._objective(*args)  # type: ignore[operator]
            if self.num_calls == 3:
                raise ValueError("an objective of this run alone")
            return result

    failing.objective = Broken(failing.objective)  # type: ignore[assignment]
    errors = at_once([steps(trainer, NUM_STEPS) for trainer in trainers])
    assert str(errors[0]) == "an objective of this run alone" and errors[1:] == [None, None]
    assert witness.sizes[3] >= 1
    assert [bits(trainer) for trainer in trainers[1:]] == _bits_alone(make)[1:]
    assert all(master.grad is None for master in failing.adapter.parameters())


@pytest.mark.slow
def test_memory_that_runs_out_in_company_costs_the_company_and_no_run_its_packs(
    base: BaseModel, codec: TemplateCodec
) -> None:
    make = _alike(base, codec)
    witness = Witness(SharedForward(base.model, CPU))

    def too_many(packs: Sequence[AskedRows]) -> None:
        if len(packs) > 1:
            raise torch.OutOfMemoryError("joint")

    witness.failing = too_many
    trainers = make(witness.shared)
    assert at_once([steps(trainer, NUM_STEPS) for trainer in trainers]) == [None] * 3
    assert [bits(trainer) for trainer in trainers] == _bits_alone(make)
    assert [trainer.memory.max_slice_tokens for trainer in trainers] == [2048] * 3
    assert witness.shared.turns.max_tokens is not None and witness.shared.turns.max_tokens < 512
    incidents = [incident for trainer in trainers for incident in trainer.incidents]
    assert incidents and all(incident.endswith(": it is done again alone.") for incident in incidents)


@pytest.mark.slow
def test_memory_that_runs_out_in_the_joint_backward_leaves_no_half_a_gradient(
    base: BaseModel, codec: TemplateCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = _alike(base, codec)
    expected = _bits_alone(make)
    witness = Witness(SharedForward(base.model, CPU))
    backward = torch.autograd.backward
    failures: list[str] = []

    def failing(*args: Any, **kwargs: Any) -> None:
        backward(*args, **kwargs)
        if len(kwargs.get("inputs") or ()) > len(trainers[0].adapter.parameters()) and not failures:
            failures.append("joint")
            raise torch.OutOfMemoryError("joint")

    trainers = make(witness.shared)
    monkeypatch.setattr("adapters.shared_forward.torch.autograd.backward", failing)
    assert at_once([steps(trainer, NUM_STEPS) for trainer in trainers]) == [None] * 3
    assert failures
    assert [bits(trainer) for trainer in trainers] == expected


def test_an_error_that_one_run_brings_is_its_own_affair(base: BaseModel, codec: TemplateCodec) -> None:
    make = _alike(base, codec)
    witness = Witness(SharedForward(base.model, CPU))
    trainers = make(witness.shared)
    poisoned = trainers[1].train.tokens
    poisoned[:] = base.vocab_size + 5
    errors = at_once([steps(trainer, NUM_STEPS) for trainer in trainers])
    assert isinstance(errors[1], IndexError) and errors[0] is None and errors[2] is None
    expected = _bits_alone(_alike(base, codec, 1))
    assert bits(trainers[0]) == expected[0]


class Stopped(BaseException):
    """As the heartbeat's StopRequested."""


def test_a_run_that_is_stopped_between_packs_resumes_in_company_to_the_same_bits(
    base: BaseModel, codec: TemplateCodec
) -> None:
    make = _alike(base, codec, 2)
    shared = SharedForward(base.model, CPU)
    trainers = make(shared)

    def stop() -> None:
        if trainers[0].steps_done == 2:
            raise Stopped

    def interrupted() -> None:
        try:
            for _ in range(NUM_STEPS):
                trainers[0].step(stop)
        finally:
            trainers[0].leave()

    errors = at_once([interrupted, steps(trainers[1], NUM_STEPS)])
    assert isinstance(errors[0], Stopped) and errors[1] is None
    fresh = make(shared)
    fresh[0].load_state_dict(trainers[0].state_dict())
    assert at_once([steps(fresh[0], NUM_STEPS - 2), steps(fresh[1], NUM_STEPS)]) == [None, None]
    assert bits(fresh[0]) == _bits_alone(make)[0]


@pytest.mark.slow
def test_a_large_run_gets_no_more_tokens_than_a_small_one(base: BaseModel, codec: TemplateCodec) -> None:
    """Beside a run with packs of many tokens, one with few steps much more often."""
    shared = SharedForward(base.model, CPU)
    small = _trainer(base, codec, shared, replace(CONFIG, batch_size=1, eval_every=10_000))
    large = _trainer(base, codec, shared, replace(CONFIG, seed=1, batch_size=12, eval_every=10_000))
    tokens: list[tuple[int, int]] = []

    def small_steps() -> None:
        try:
            for _ in range(30):
                small.step()
                tokens.append((small.trained_tokens, large.trained_tokens))
        finally:
            small.leave()

    assert at_once([small_steps, steps(large, 3)]) == [None, None]
    budget = CONFIG.max_slice_tokens
    while_both_ran = [(mine, its) for mine, its in tokens if large.steps_done < 3 or its < large.trained_tokens]
    assert large.steps_done == 3 and len(while_both_ran) >= 10
    assert all(its - mine <= 2 * budget + large.history[0].num_tokens for mine, its in while_both_ran)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_batched_products_of_all_runs_equal_those_run_by_run(base: BaseModel, dropout: float) -> None:
    """What CUDA uses: other sums, the same result within rounding."""
    site = base.lora_sites["model.layers.0.self_attn.q_proj"]
    specs = [
        LoraSpec(r=4, lora_alpha=8, lora_dropout=dropout),
        LoraSpec(r=16, lora_alpha=4, target_modules=("q_proj", "v_proj")),
        LoraSpec(r=2, lora_alpha=2, target_modules=("down_proj",)),
        LoraSpec(r=8, lora_alpha=8, target_modules=("k_proj",)),
    ]
    adapters = [TrainableLora(spec, base.signature, seed=3, device=CPU) for spec in specs]
    for seed, adapter in enumerate(adapters):
        for b in adapter.b.values():
            torch.nn.init.normal_(b, std=0.1, generator=torch.Generator().manual_seed(seed))
    rows = [5, 2, 7, 7]
    apart = _through(site, adapters, rows, batched=False)
    batched = _through(site, adapters, rows, batched=True)
    assert apart.keys() == batched.keys() and len(apart) > 8
    for name, tensor in apart.items():
        torch.testing.assert_close(batched[name], tensor, rtol=2e-2, atol=2e-2, msg=name)
    assert torch.count_nonzero(apart["y"]) > 0


def test_a_run_that_explodes_does_not_reach_its_neighbours_in_batched_products(base: BaseModel) -> None:
    site = base.lora_sites["model.layers.0.mlp.gate_proj"]
    adapters = [TrainableLora(SPEC, base.signature, seed=seed, device=CPU) for seed in range(3)]
    for adapter in adapters:
        for b in adapter.b.values():
            torch.nn.init.constant_(b, 0.1)
    torch.nn.init.constant_(adapters[1].a["model.layers.0.mlp.gate_proj"], float("nan"))
    found = _through(site, adapters, [3, 4, 5], batched=True)
    ours = {name: tensor for name, tensor in found.items() if name.startswith(("0.", "2."))}
    assert len(ours) == 8 and all(bool(tensor.isfinite().all()) for tensor in ours.values())
    assert bool(found["y"][:, :3].isfinite().all()) and bool(found["y"][:, 7:].isfinite().all())
    assert not bool(found["y"][:, 3:7].isfinite().all())


def _through(
    site: BatchedLoraLinear, adapters: list[TrainableLora], rows: list[int], *, batched: bool
) -> dict[str, torch.Tensor]:
    """Output and gradients of one site under a routing of all adapters."""
    generator = torch.Generator().manual_seed(1)
    num_rows, num_out = sum(rows), site.spans[-1][1]
    x = torch.randn(1, num_rows, site.in_features, generator=generator).bfloat16().requires_grad_()
    y = torch.randn(1, num_rows, num_out, generator=generator).bfloat16().requires_grad_()
    grad = torch.randn(1, num_rows, num_out, generator=generator).bfloat16()
    routes = [TrainRouting(adapter, generator=torch.Generator().manual_seed(9)) for adapter in adapters]
    out = SegmentRouting(routes, rows, rows, batched).apply(site, x, y)
    for adapter in adapters:
        for parameter in adapter.parameters():
            parameter.grad = None
    out.backward(grad)
    assert x.grad is not None and y.grad is not None
    found = {"y": out.detach(), "x.grad": x.grad, "y.grad": y.grad}
    for index, adapter in enumerate(adapters):
        for name in adapter.names:
            for kind, master in (("a", adapter.a[name]), ("b", adapter.b[name])):
                if master.grad is not None:
                    found[f"{index}.{name}.{kind}"] = master.grad
    return found
