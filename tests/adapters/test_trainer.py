"""The trainer against plain PEFT + AdamW, and the promise that a resumed run is the same run to the last bit."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from adapters.corpus import Corpus, build_corpus
from adapters.errors import TrainingError
from adapters.example import ChatExample, Message
from adapters.lora_weights import LoraSpec
from adapters.peft_format import write_adapter
from adapters.recipe import TrainConfig, learning_rate_factor
from adapters.trainable import TrainableLora, TrainRouting
from adapters.trainer import Trainer
from tests.adapters.conftest import GraftedBase, TemplateCodec

CONFIG = TrainConfig(num_epochs=3, batch_size=4, learning_rate=5e-3, seed=7, eval_every=4, max_slice_tokens=128)
SPEC = LoraSpec(r=4, lora_alpha=8)


def _corpus(codec: TemplateCodec, count: int = 20, seed: int = 0) -> Corpus:
    """Short chats of very different lengths."""
    numbers = torch.randint(1, 12, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    examples = [
        ChatExample(
            line,
            (
                Message("user", f"say {number} {'very ' * (number * (line % 3))}often"),
                Message("assistant", " ".join(["tree"] * number), trained=True),
            ),
        )
        for line, number in enumerate(numbers, start=1)
    ]
    return build_corpus(examples, codec, max_length=256)


def _trainer(base: GraftedBase, codec: TemplateCodec, config: TrainConfig = CONFIG, spec: LoraSpec = SPEC) -> Trainer:
    adapter = TrainableLora(spec, base.signature, seed=config.seed, device=torch.device("cpu"))
    return Trainer(base.model, adapter, _corpus(codec), _corpus(codec, 6, seed=1), config)


def _run(trainer: Trainer, num_steps: int) -> None:
    for _ in range(num_steps):
        trainer.step()
        if trainer.evaluation_due:
            trainer.evaluate()


def _bits(trainer: Trainer) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in trainer.adapter.parameters()]


def _through_a_file(state: dict[str, object]) -> dict[str, object]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, object] = torch.load(buffer, weights_only=True)
    return loaded


def _plain_peft_losses(base_dir: Path, adapter_dir: Path, trainer: Trainer, num_steps: int) -> list[float]:
    """The padded loop everybody writes: same data, same order, same start."""
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_dir), adapter_dir, is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=CONFIG.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(CONFIG.schedule, step, trainer.num_steps, CONFIG.warmup_ratio)
    )
    losses = []
    for step in range(num_steps):
        rows = [trainer.train.sequence(index) for index in trainer.cursor.batch(step)]
        longest = max(len(tokens) for tokens, _ in rows)
        ids, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest)
        labels = torch.full((len(rows), longest), -100)
        for row, (tokens, trained) in enumerate(rows):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens.long(), 1
            labels[row, : len(tokens)] = torch.where(trained, tokens.long(), -100)
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CONFIG.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # raised within PEFT
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj", "lm_head")])
def test_losses_are_those_of_plain_peft_and_adamw(
    grafted: GraftedBase, codec: TemplateCodec, tiny_llama_dir: Path, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    trainer = _trainer(grafted, codec, spec=replace(SPEC, target_modules=targets))
    write_adapter(tmp_path, trainer.adapter.weights(), base_name=str(tiny_llama_dir), base=grafted.signature)
    ours = [trainer.step().loss for _ in range(8)]
    theirs = _plain_peft_losses(tiny_llama_dir, tmp_path, trainer, 8)
    assert ours == pytest.approx(theirs, rel=2e-4)
    assert ours[-1] < ours[0] - 0.5


@pytest.mark.slow
def test_five_steps_a_kill_and_five_more_are_ten_steps_bit_for_bit(grafted: GraftedBase, codec: TemplateCodec) -> None:
    straight = _trainer(grafted, codec)
    _run(straight, 10)
    first_half = _trainer(grafted, codec)
    _run(first_half, 5)
    saved = _through_a_file(first_half.state_dict())
    _run(first_half, 2)  # lost with the process
    resumed = _trainer(grafted, codec)
    resumed.load_state_dict(saved)
    _run(resumed, 5)
    assert _bits(resumed) == _bits(straight)
    assert resumed.history == straight.history
    assert resumed.scores == straight.scores
    assert resumed.best_step == straight.best_step
    assert resumed.trained_tokens == straight.trained_tokens
    for name, pair in straight.best_weights().modules.items():
        assert torch.equal(pair.a, resumed.best_weights().modules[name].a)
        assert torch.equal(pair.b, resumed.best_weights().modules[name].b)


@pytest.mark.slow
def test_a_run_with_dropout_resumes_bit_for_bit_whatever_others_draw(
    grafted: GraftedBase, codec: TemplateCodec
) -> None:
    spec = replace(SPEC, lora_dropout=0.3)
    straight, first_half = (_trainer(grafted, codec, spec=spec) for _ in range(2))
    _run(straight, 4)
    _run(first_half, 2)
    torch.rand(17)  # another thread used the global generator
    resumed = _trainer(grafted, codec, spec=spec)
    resumed.load_state_dict(_through_a_file(first_half.state_dict()))
    _run(resumed, 2)
    assert _bits(resumed) == _bits(straight)
    no_dropout = _trainer(grafted, codec)
    _run(no_dropout, 4)
    assert _bits(no_dropout) != _bits(straight)


def test_a_step_interrupted_between_packs_has_not_happened(grafted: GraftedBase, codec: TemplateCodec) -> None:
    straight, interrupted = _trainer(grafted, codec), _trainer(grafted, codec)
    _run(straight, 4)
    _run(interrupted, 3)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted.step(between_packs=stop)
    assert interrupted.steps_done == 3
    assert all(p.grad is None for p in interrupted.adapter.parameters())
    _run(interrupted, 1)
    assert _bits(interrupted) == _bits(straight)


def test_how_a_step_is_cut_into_packs_does_not_change_what_it_learns(
    grafted: GraftedBase, codec: TemplateCodec
) -> None:
    packs: list[int] = []
    whole = _trainer(grafted, codec, replace(CONFIG, max_slice_tokens=10_000))
    pieces = _trainer(grafted, codec, replace(CONFIG, max_slice_tokens=1))
    for _ in range(3):
        expected = whole.step()
        packs.clear()
        result = pieces.step(between_packs=lambda: packs.append(1))
        assert len(packs) == CONFIG.batch_size
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
        assert result.accuracy == expected.accuracy


def test_an_epoch_shows_every_example_once_and_epochs_differ(grafted: GraftedBase, codec: TemplateCodec) -> None:
    trainer = _trainer(grafted, codec)
    epochs = [[index for step in range(5) for index in trainer.cursor.batch(epoch * 5 + step)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]


def test_training_changes_no_bit_of_the_base_and_switches_nothing(grafted: GraftedBase, codec: TemplateCodec) -> None:
    def fingerprint() -> str:
        digest = hashlib.sha256()
        for name, tensor in grafted.model.state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    before = fingerprint()
    trainer = _trainer(grafted, codec)
    _run(trainer, 3)
    assert fingerprint() == before
    assert not grafted.model.training
    assert not any(p.requires_grad or p.grad is not None for p in grafted.model.parameters())


@pytest.mark.slow
def test_an_evaluation_is_due_on_its_steps_and_at_the_end_of_every_epoch(
    grafted: GraftedBase, codec: TemplateCodec
) -> None:
    trainer = _trainer(grafted, codec)
    _run(trainer, trainer.num_steps)
    assert sorted(trainer.scores) == [4, 5, 8, 10, 12, 15]
    assert trainer.done


@pytest.mark.slow
def test_the_best_weights_are_those_of_the_lowest_validation_loss(grafted: GraftedBase, codec: TemplateCodec) -> None:
    trainer = _trainer(grafted, codec, replace(CONFIG, learning_rate=0.2, num_epochs=8))  # unstable on purpose
    snapshots = {}
    while not trainer.done:
        trainer.step()
        if trainer.evaluation_due:
            trainer.evaluate()
            snapshots[trainer.steps_done] = trainer.adapter.weights()
    best = min(trainer.scores, key=lambda step: trainer.scores[step].loss)
    assert trainer.best_step == best
    for name, pair in snapshots[best].modules.items():
        assert torch.equal(trainer.best_weights().modules[name].b, pair.b)


def test_a_run_stops_early_when_patience_is_over(grafted: GraftedBase, codec: TemplateCodec) -> None:
    trainer = _trainer(grafted, codec, replace(CONFIG, learning_rate=1e-12, patience=2, eval_every=1))
    trainer.step()
    trainer.evaluate()
    trainer.best_step = 1  # nothing can be better from here on
    trainer.scores[1] = replace(trainer.scores[1], loss=-1.0)
    _run(trainer, 1)
    assert not trainer.done
    _run(trainer, 1)
    assert trainer.stopped_early
    assert trainer.done


def test_a_loss_that_is_not_finite_is_skipped_and_then_ends_the_run(grafted: GraftedBase, codec: TemplateCodec) -> None:
    trainer = _trainer(grafted, codec)
    trainer.step()
    with torch.no_grad():
        trainer.adapter.parameters()[1].fill_(float("nan"))
    assert trainer.step().skipped
    assert trainer.step().skipped
    with pytest.raises(TrainingError, match="not finite since step 2: try a lower learning rate") as caught:
        trainer.step()
    assert caught.value.code == "non_finite_loss"


def test_a_skipped_step_moves_no_master(grafted: GraftedBase, codec: TemplateCodec) -> None:
    trainer = _trainer(grafted, codec)
    trainer.step()
    before = _bits(trainer)
    parameter = trainer.adapter.parameters()[0]
    hook = parameter.register_hook(lambda gradient: gradient * float("inf"))
    assert trainer.step().skipped
    hook.remove()
    assert _bits(trainer) == before
    assert not trainer.step().skipped


def test_a_state_of_other_settings_is_refused(grafted: GraftedBase, codec: TemplateCodec) -> None:
    state = _trainer(grafted, codec).state_dict()
    with pytest.raises(TrainingError, match="other settings"):
        _trainer(grafted, codec, replace(CONFIG, learning_rate=1.0)).load_state_dict(state)


def test_a_validation_score_is_the_mean_over_all_learned_tokens(grafted: GraftedBase, codec: TemplateCodec) -> None:
    trainer = _trainer(grafted, codec)
    _run(trainer, 2)
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for index in range(len(trainer.valid)):
            loss, hits = trainer.loss(trainer.valid, [index], TrainRouting(trainer.adapter, training=False))
            total, right = total + loss.item(), right + int(hits)
            count += int(trainer.valid.sequence(index)[1].sum())
    score = trainer.evaluate()
    assert score.loss == pytest.approx(total / count, rel=1e-5)
    assert score.accuracy == right / count


def test_equal_weights_are_written_to_equal_bytes(grafted: GraftedBase, codec: TemplateCodec, tmp_path: Path) -> None:
    """The writer's metadata came in random order: one adapter had two digests."""
    weights = _trainer(grafted, codec).adapter.weights()
    written = set()
    for copy in range(12):
        write_adapter(tmp_path / str(copy), weights, base_name="tiny", base=grafted.signature)
        written.add((tmp_path / str(copy) / "adapter_model.safetensors").read_bytes())
    assert len(written) == 1
