"""Learning from pairs (DPO): against the paper's formula spelled out, and against plain PEFT with its adapter off."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from adapters.dataset import preferences_at, read_preferences
from adapters.errors import DatasetError
from adapters.example import PreferenceExample
from adapters.lora import routing
from adapters.peft_format import write_adapter
from adapters.recipe import learning_rate_factor
from adapters.trainable import TrainableLora, TrainRouting
from adapters.trainer import Trainer
from tests.adapters.conftest import GraftedBase, TemplateCodec
from tests.adapters.corpora import CONFIG, SPEC, bits, make_trainer, pairs, run

DPO = replace(CONFIG, beta=0.3, learning_rate=2e-3)


def _trainer(base: GraftedBase, codec: TemplateCodec, **config: Any) -> Trainer:
    return make_trainer(base, pairs(codec), pairs(codec, 6, seed=1), replace(DPO, **config))


def _log_p(model: Any, tokens: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Token by token, one sequence at a time, no packing: a scalar."""
    logits: torch.Tensor = model(input_ids=tokens[None].long(), use_cache=False).logits[0].float()
    total: torch.Tensor = logits.new_zeros(())
    for position in range(1, len(tokens)):
        if learned[position]:
            total = total + logits[position - 1].log_softmax(-1)[int(tokens[position])]
    return total


def _slow_pair(model: Any, reference: Any, trainer: Trainer, pair: int, beta: float) -> torch.Tensor:
    """The reward margin of one pair: a scalar."""
    chosen, rejected = (trainer.train.sequence(2 * pair + which) for which in (0, 1))
    ours = _log_p(model, *chosen) - _log_p(model, *rejected)
    with torch.no_grad():
        theirs = reference(*chosen) - reference(*rejected)
    margin: torch.Tensor = beta * (ours - theirs)
    return margin


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # raised within PEFT
def test_steps_are_those_of_a_plain_peft_loop_with_the_adapter_off_as_reference(
    grafted: GraftedBase, codec: TemplateCodec, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    trainer = _trainer(grafted, codec)
    write_adapter(tmp_path, trainer.adapter.weights(), base_name=str(tiny_llama_dir), base=grafted.signature)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama_dir), tmp_path, is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=DPO.learning_rate, weight_decay=0.0)

    def reference(tokens: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
        with model.disable_adapter():
            return _log_p(model, tokens, learned)

    for step in range(6):
        batch = trainer.cursor.batch(step)
        margins = torch.stack([_slow_pair(model, reference, trainer, pair, 0.3) for pair in batch])
        loss = -torch.log(1 / (1 + torch.exp(-margins))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, DPO.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = DPO.learning_rate * learning_rate_factor(DPO.schedule, step, trainer.num_steps, 0.05)
        optimizer.step()
        optimizer.zero_grad()
        ours = trainer.step()
        assert ours.loss == pytest.approx(loss.item(), rel=2e-4)
        assert ours.margin == pytest.approx(margins.mean().item(), rel=2e-3, abs=1e-4)
        assert ours.accuracy == (margins > 0).float().mean().item()
    theirs = dict(model.named_parameters())
    for name in trainer.adapter.names:
        for half, mine in (("A", trainer.adapter.a[name]), ("B", trainer.adapter.b[name])):
            other = theirs[f"base_model.model.{name}.lora_{half}.default.weight"]
            assert torch.allclose(mine, other, atol=5e-4)


def test_the_first_step_prefers_nothing_and_costs_a_coin_toss(grafted: GraftedBase, codec: TemplateCodec) -> None:
    first = _trainer(grafted, codec).step()
    assert first.loss == pytest.approx(math.log(2), rel=1e-5)
    assert first.margin == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_training_learns_the_preference(grafted: GraftedBase, codec: TemplateCodec) -> None:
    trainer = _trainer(grafted, codec)
    run(trainer, trainer.num_steps)
    score = trainer.scores[trainer.num_steps]
    assert score.loss < 0.5
    assert score.accuracy == 1.0
    assert score.margin is not None and score.margin > 0.5


@pytest.mark.slow
def test_a_run_that_continues_an_adapter_is_held_to_that_adapter(grafted: GraftedBase, codec: TemplateCodec) -> None:
    """The reference was the base: a continued run began with a margin that nobody had asked for."""
    parent = _trainer(grafted, codec)
    run(parent, 8)
    adapter = TrainableLora(SPEC, grafted.signature, seed=0, device=torch.device("cpu"))
    adapter.load(parent.adapter.weights().modules)
    child = Trainer(grafted.model, adapter, parent.train, parent.valid, DPO)
    frozen = TrainableLora(SPEC, grafted.signature, seed=0, device=torch.device("cpu"))
    frozen.load(parent.adapter.weights().modules)

    def reference(tokens: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
        with routing(TrainRouting(frozen, training=False)):
            return _log_p(grafted.model, tokens, learned)

    assert child.step().margin == pytest.approx(0.0, abs=1e-5)
    child.step()
    batch = child.cursor.batch(2)
    with torch.no_grad(), routing(TrainRouting(adapter, training=False)):
        margins = torch.stack([_slow_pair(grafted.model, reference, child, pair, 0.3) for pair in batch])
    assert child.step().margin == pytest.approx(margins.mean().item(), rel=1e-3, abs=1e-5)


def test_both_answers_of_a_pair_share_a_pack_whatever_its_size(grafted: GraftedBase, codec: TemplateCodec) -> None:
    whole, pieces = _trainer(grafted, codec, max_slice_tokens=10_000), _trainer(grafted, codec, max_slice_tokens=1)
    packs: list[int] = []
    whole.step(), pieces.step()
    expected = whole.step()
    result = pieces.step(between_packs=lambda: packs.append(1))
    assert len(packs) == DPO.batch_size
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_preference_run_is_the_same_run_to_the_last_bit(grafted: GraftedBase, codec: TemplateCodec) -> None:
    straight, first_half = (_trainer(grafted, codec) for _ in range(2))
    run(straight, 7)
    run(first_half, 3)
    buffer = io.BytesIO()
    torch.save(first_half.state_dict(), buffer)
    buffer.seek(0)
    resumed = _trainer(grafted, codec)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    run(resumed, 4)
    assert bits(resumed) == bits(straight)
    assert resumed.history == straight.history
    assert resumed.scores == straight.scores


GOOD = (
    b'{"input": {"messages": [{"role": "user", "content": "hi"}]},'
    b' "preferred_output": [{"role": "assistant", "content": "yes"}],'
    b' "non_preferred_output": [{"role": "assistant", "content": "no"}]}'
)


def test_a_preference_line_is_read_as_openai_writes_it() -> None:
    examples = list(read_preferences(io.BytesIO(b"\n".join([GOOD] * 10))))
    assert [example.line for example in examples] == list(range(1, 11))
    first = examples[0]
    assert (first.prompt[0].content, first.preferred_answer, first.non_preferred_answer) == ("hi", "yes", "no")
    assert first.preferred.messages[-1].trained and first.preferred.answer == "yes"
    assert [e.line for e in preferences_at(io.BytesIO(b"\n".join([GOOD] * 10)), [3])] == [3]


def test_earlier_answers_in_the_prompt_are_not_learned(codec: TemplateCodec) -> None:
    line = GOOD.replace(b'{"role": "user", "content": "hi"}', b'{"role": "user", "content": "a"},'
                        b'{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}')  # fmt: skip
    (example,) = read_preferences(io.BytesIO(line), minimum=1)
    assert isinstance(example, PreferenceExample)
    assert [message.trained for message in example.preferred.messages] == [False, False, False, True]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b'"input"', b'"inputs"', "unknown key 'inputs'"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', b"3", "'input' must be an object"),
        (b'[{"role": "user", "content": "hi"}]', b"[]", "'input.messages' must be a list"),
        (b'"role": "user"', b'"role": "assistant"', "must not be from 'assistant'"),
        (b'"content": "hi"', b'"content": ""', "input.messages[0]: 'content' is empty"),
        (b'[{"role": "assistant", "content": "no"}]', b'"no"', "'non_preferred_output' must be a list"),
        (b'"assistant", "content": "no"', b'"user", "content": "no"', "one message from 'assistant'"),
        (b'"no"', b'"yes"', "are the same: there is nothing to prefer"),
        (GOOD, b'{"messages": []}', "an example for the method 'supervised'"),
        (GOOD, b"[]", "must be a JSON object with 'input'"),
    ],
)
def test_a_bad_preference_line_is_named(old: bytes, new: bytes, said: str) -> None:
    lines = [*[GOOD] * 10, GOOD.replace(old, new)]
    with pytest.raises(DatasetError) as caught:
        list(read_preferences(io.BytesIO(b"\n".join(lines))))
    assert caught.value.line == 11
    assert said in caught.value.message
