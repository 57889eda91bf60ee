"""Train the bundled base: a small Llama with its own BPE tokenizer, on the CPU, to a wall-clock budget.

    python -m tools.make_tiny_base --data DATA --work WORK --minutes 90 --out bases/tiny

The phases below run in order and each is skipped when its result already lies in WORK, so the command can
be stopped at any moment and given again: it goes on from the last checkpoint with the same optimizer
state, schedule, random state and place in the data. ``--minutes`` counts training seconds over all runs;
raising it on a resumed run stretches the schedule, ``--export-only`` writes what there is.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools import tiny_base_data as data
from tools.tiny_base_support import SupportMaker
from tools.tiny_base_tasks import TaskMaker

VOCAB = 6144
MICRO_TOKENS = 1024
MICRO_PER_STEP = 8
SHORT = ((256, 1.0),)
LONG = ((256, 0.75), (512, 0.15), (1024, 0.10))
LONG_FROM = 0.6
PEAK_LR, WARMUP, DECAY_FROM = 4e-3, 0.02, 0.45
TASK_DOCUMENTS, SUPPORT_DOCUMENTS = 260_000, 120_000
# Share of tokens per source at the start and at the end; linear in between.
MIX_START = {"books": 0.44, "peps": 0.04, "dialogues": 0.18, "instructions": 0.20, "support": 0.14}
# Prose comes back for the last tenth, else the model ends up talking like a booking agent everywhere.
MIX_LAST = {"books": 0.60, "peps": 0.03, "dialogues": 0.13, "instructions": 0.12, "support": 0.12}
LAST_FROM = 0.9
MIX_END = {"books": 0.20, "peps": 0.02, "dialogues": 0.20, "instructions": 0.23, "support": 0.35}
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

Tokens = npt.NDArray[np.uint16]


# --- 1. documents --------------------------------------------------------------------------------------


def build_documents(folder: Path, seed: int) -> dict[str, tuple[list[str], list[str]]]:
    """Training and held-out documents of every source; tasks never mix the two sides' dialogues."""
    rng, corpora = random.Random(seed), folder / "corpora"
    books, peps = data.split(data.load_books(corpora), rng), data.split(data.load_peps(corpora), rng)
    talks = data.split(data.load_sgd(corpora) + data.load_taskmaster(corpora), rng)
    rendered = [[data.chat_of(d, rng) for d in side] for side in talks]
    tasks = []
    for side, prose, count in zip(talks, books, (TASK_DOCUMENTS, 1_500), strict=True):
        maker = TaskMaker(side, prose, rng)
        tasks.append([maker.draw() for _ in range(count)])
    support = []
    for held, count in ((False, SUPPORT_DOCUMENTS), (True, 1_000)):
        asker = SupportMaker(folder, rng, held)
        support.append([asker.draw() for _ in range(count)])
    wrap = [[[f"{data.BOS}{text}{data.EOS}" for text in side] for side in pair] for pair in (books, peps)]
    return {
        "books": (wrap[0][0], wrap[0][1]),
        "peps": (wrap[1][0], wrap[1][1]),
        "dialogues": (rendered[0], rendered[1]),
        "instructions": (tasks[0], tasks[1]),
        "support": (support[0], support[1]),
    }


# --- 2. tokenizer --------------------------------------------------------------------------------------


def train_tokenizer(documents: dict[str, tuple[list[str], list[str]]], seed: int) -> Tokenizer:
    """Byte-level BPE (lossless for any text); single digits; learnt on a sample weighted towards chat."""
    rng = random.Random(seed)
    budget = {"books": 9e6, "peps": 1.5e6, "dialogues": 5e6, "instructions": 7e6, "support": 2e6}
    sample: list[str] = []
    for source, (train, _) in documents.items():
        used = 0
        for text in rng.sample(train, len(train)):
            sample.append(text)
            used += len(text)
            if used > budget[source]:
                break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=data.SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> Tokens:
    """All documents as one stream of token ids."""
    parts: list[Tokens] = []
    for start in range(0, len(documents), 4_000):
        batch = tokenizer.encode_batch_fast(documents[start : start + 4_000])
        parts += [np.asarray(item.ids, dtype=np.uint16) for item in batch]
    return np.concatenate(parts)


def prepare(folder: Path, work: Path, seed: int) -> None:
    """Phases 1 and 2; leaves ``tokenizer.json``, ``{source}.npy`` and ``{source}.heldout.npy`` in WORK."""
    if all((work / f"{source}.npy").exists() for source in data.SOURCES):
        return
    documents = build_documents(folder, seed)
    if not (work / "tokenizer.json").exists():
        train_tokenizer(documents, seed).save(str(work / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    for source, (train_side, held) in documents.items():
        for side, name in ((held, f"{source}.heldout.npy"), (train_side, f"{source}.npy")):
            if not (work / name).exists():
                stream = encode(tokenizer, side)
                np.save(work / name, stream)
                print(f"{name}: {len(side):,} documents, {len(stream):,} tokens", flush=True)


# --- 3. model and optimizers ---------------------------------------------------------------------------


def make_model() -> LlamaForCausalLM:
    """Every linear layer's in_features is a multiple of 64, the block size of NF4."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=320,
        intermediate_size=832,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=data.SPECIAL_TOKENS.index(data.BOS),
        eos_token_id=[data.SPECIAL_TOKENS.index(data.IM_END), data.SPECIAL_TOKENS.index(data.EOS)],
        pad_token_id=data.SPECIAL_TOKENS.index(data.PAD),
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy over the tied output layer, a few rows at a time.

    The logits of a whole batch would be far larger than the processor's cache (and cost more in page
    faults than in arithmetic), so loss and gradients are formed chunk by chunk in the forward pass.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean loss; the gradients are computed here and kept for ``backward``."""
        count, total = len(target), 0.0
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32)
        for start in range(0, count, ChunkedLoss.CHUNK):
            rows, wanted = hidden[start : start + ChunkedLoss.CHUNK], target[start : start + ChunkedLoss.CHUNK]
            log_p = torch.log_softmax((rows @ weight.T).float(), -1)
            total += float(functional.nll_loss(log_p, wanted, reduction="sum"))
            log_p.exp_()[torch.arange(len(wanted)), wanted] -= 1
            delta = log_p.mul_(1 / count).to(weight.dtype)
            grad_hidden[start : start + ChunkedLoss.CHUNK] = delta @ weight
            grad_weight += delta.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return torch.tensor(total / count)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Hand out the stored gradients."""
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None


def chunked_loss(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Typed front of ``ChunkedLoss``."""
    loss: torch.Tensor = ChunkedLoss.apply(hidden, weight, target)
    return loss


class Learner:
    """bf16 weights for the arithmetic, fp32 master weights for the updates: Muon inside, AdamW outside.

    Each thread works on micro-batches of its own with its own bf16 copy. That beats threads inside every
    operation (no fork and join around small matrices), and a busy neighbour on one core slows one copy
    instead of stopping both.
    """

    def __init__(self, threads: int) -> None:
        first = make_model().train()
        self.master = {n: p.detach().clone().float() for n, p in first.named_parameters()}
        self.copies = [first.to(torch.bfloat16), *(copy.deepcopy(first) for _ in range(threads - 1))]
        inside = [w for n, w in self.master.items() if w.ndim == 2 and "embed" not in n]
        outside = [w for n, w in self.master.items() if w.ndim != 2 or "embed" in n]
        self.muons = [
            torch.optim.Muon(inside[i::threads], lr=PEAK_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
            for i in range(threads)
        ]
        self.adam = torch.optim.AdamW(outside, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0)
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def gradients(self, windows: list[torch.Tensor]) -> float:
        """Mean loss of the micro-batches; leaves the mean gradient in the master weights."""
        waiting = list(reversed(windows))
        parts = list(self.pool.map(lambda model: self._work(model, waiting), self.copies))
        for name, master in self.master.items():
            grads = [w.grad for model in self.copies if (w := model.get_parameter(name)).grad is not None]
            master.grad = torch.stack([grad.float() for grad in grads]).sum(0) / len(windows)
        for model in self.copies:
            model.zero_grad(set_to_none=True)
        return sum(parts) / len(windows)

    @staticmethod
    def _work(model: LlamaForCausalLM, waiting: list[torch.Tensor]) -> float:
        """One thread: take micro-batches until none is left; returns the sum of their losses."""
        total = 0.0
        while True:
            try:
                window = waiting.pop()
            except IndexError:
                return total
            hidden = model.model(input_ids=window[:, :-1]).last_hidden_state
            loss = chunked_loss(hidden.flatten(0, 1), model.lm_head.weight, window[:, 1:].flatten())
            loss.backward()
            total += float(loss.detach())

    def update(self, lr: float) -> None:
        """Clip, step, and copy the master weights back into the bf16 model."""
        torch.nn.utils.clip_grad_norm_(self.master.values(), 1.0)
        optimizers: list[torch.optim.Optimizer] = [*self.muons, self.adam]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        list(self.pool.map(lambda optimizer: optimizer.step(), optimizers))
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy the master weights into the bf16 copies."""
        for model in self.copies:
            for name, weight in model.named_parameters():
                weight.copy_(self.master[name])

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        muons = [muon.state_dict() for muon in self.muons]
        return {"master": self.master, "muons": muons, "adam": self.adam.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of ``state``."""
        for muon, saved in zip(self.muons, state["muons"], strict=True):
            muon.load_state_dict(saved)
        self.adam.load_state_dict(state["adam"])
        for name, weight in self.master.items():
            weight.copy_(state["master"][name])
        self._publish()


# --- 4. training ---------------------------------------------------------------------------------------


class Feed:
    """Draws windows from the sources by share; each source is read in order from a cursor and wraps."""

    def __init__(self, work: Path, seed: int) -> None:
        self.streams: dict[str, Tokens] = {s: np.load(work / f"{s}.npy", mmap_mode="r") for s in data.SOURCES}
        self.cursor = dict.fromkeys(data.SOURCES, 0)
        self.rng = random.Random(seed)

    def draw(self, progress: float) -> torch.Tensor:
        """One micro-batch of MICRO_TOKENS; windows of one length, each from a freshly drawn source."""
        lengths, odds = zip(*(SHORT if progress < LONG_FROM else LONG), strict=True)
        length = self.rng.choices(lengths, odds)[0]
        shares = [MIX_START[s] + (MIX_END[s] - MIX_START[s]) * progress for s in data.SOURCES]
        if progress >= LAST_FROM:
            shares = [MIX_LAST[s] for s in data.SOURCES]
        rows = []
        for source in self.rng.choices(data.SOURCES, shares, k=MICRO_TOKENS // length):
            stream, at = self.streams[source], self.cursor[source]
            if at + length + 1 > len(stream):
                at = self.rng.randrange(length)
            rows.append(torch.from_numpy(stream[at : at + length + 1].astype(np.int64)))
            self.cursor[source] = at + length
        return torch.stack(rows)


def rate(progress: float) -> float:
    """Warm-up, a long plateau, then linear to zero: only the decay has to know when the run ends."""
    if progress < WARMUP:
        return PEAK_LR * max(progress / WARMUP, 0.02)
    return PEAK_LR * min(1.0, max(0.0, (1 - progress) / (1 - DECAY_FROM)))


@dataclass
class Run:
    """Progress of the training, as kept in the checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    shown: float = 0.0


def save_checkpoint(work: Path, learner: Learner, feed: Feed, run: Run) -> None:
    """Atomic: a reader (or a resumed run) sees the old file or the new one."""
    state = {"learner": learner.state(), "run": vars(run), "cursor": feed.cursor, "rng": feed.rng.getstate()}
    torch.save(state, work / "checkpoint.tmp")
    os.replace(work / "checkpoint.tmp", work / "checkpoint.pt")


def load_checkpoint(work: Path, learner: Learner, feed: Feed, run: Run) -> None:
    """Take up the last checkpoint if there is one."""
    if (work / "checkpoint.pt").exists():
        state = torch.load(work / "checkpoint.pt", weights_only=False)
        learner.load(state["learner"])
        feed.cursor.update(state["cursor"])
        feed.rng.setstate(state["rng"])
        vars(run).update(state["run"])


def log_line(work: Path, row: dict[str, Any]) -> None:
    """Append one JSON line to the training log and show it."""
    with (work / "log.jsonl").open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def train(work: Path, out: Path, minutes: float, seed: int, threads: int) -> bool:
    """Phase 4: until the budget is spent (True) or the process is asked to stop (False)."""
    torch.manual_seed(seed)
    learner, feed, run = Learner(threads), Feed(work, seed), Run()
    load_checkpoint(work, learner, feed, run)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    losses: list[float] = []
    mark, saved = time.monotonic(), run.seconds
    while run.seconds < minutes * 60 and not stop.is_set():
        progress = run.seconds / (minutes * 60)
        losses.append(learner.gradients([feed.draw(progress) for _ in range(MICRO_PER_STEP)]))
        learner.update(rate(progress))
        run.step, run.tokens = run.step + 1, run.tokens + MICRO_PER_STEP * MICRO_TOKENS
        now = time.monotonic()
        run.seconds, mark = run.seconds + now - mark, now
        if run.step % 20 == 0:
            mean = sum(losses) / len(losses)
            log_line(work, {"step": run.step, "tokens": run.tokens, "minutes": round(run.seconds / 60, 2),
                            "loss": round(mean, 4), "lr": round(rate(progress), 6)})  # fmt: skip
            losses = []
        if run.seconds - saved > 240:
            save_checkpoint(work, learner, feed, run)
            export(work, out)
            saved = run.seconds
    save_checkpoint(work, learner, feed, run)
    return not stop.is_set()


# --- 5. measure and export -----------------------------------------------------------------------------


def windows_of(stream: Tokens, length: int, most: int) -> Iterator[torch.Tensor]:
    """The first ``most`` windows of a stream in batches of eight."""
    count = min(most, (len(stream) - 1) // length)
    rows = [torch.from_numpy(stream[i * length : i * length + length + 1].astype(np.int64)) for i in range(count)]
    for start in range(0, count, 8):
        yield torch.stack(rows[start : start + 8])


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, stream: Tokens, length: int = 512, most: int = 96) -> float:
    """Perplexity per token of a held-out stream."""
    total, count = 0.0, 0
    for window in windows_of(stream, length, most):
        logits = model(input_ids=window[:, :-1]).logits.flatten(0, 1).float()
        total += float(functional.cross_entropy(logits, window[:, 1:].flatten(), reduction="sum"))
        count += logits.shape[0]
    return math.exp(total / count)


def export(work: Path, out: Path) -> None:
    """Write model and tokenizer as plain ``from_pretrained`` folders do; files are replaced one by one."""
    model: Any = make_model()
    model = model.to(torch.bfloat16)
    state = torch.load(work / "checkpoint.pt", weights_only=False)["learner"]["master"]
    model.load_state_dict({name: weight.to(torch.bfloat16) for name, weight in state.items()}, strict=False)
    model.tie_weights()
    model.config.use_cache = True
    model.generation_config.update(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        use_cache=True,
    )
    staging = work / "export"
    model.save_pretrained(staging)
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer = tokenizer_class(
        tokenizer_file=str(work / "tokenizer.json"),
        bos_token=data.BOS,
        eos_token=data.IM_END,
        pad_token=data.PAD,
        additional_special_tokens=[data.IM_START, data.EOS],
        chat_template=data.CHAT_TEMPLATE,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(staging)
    settings = json.loads((staging / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    (staging / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for path in staging.iterdir():
        temporary = out / f".{path.name}.tmp"
        temporary.write_bytes(path.read_bytes())
        os.replace(temporary, out / path.name)


def report(work: Path, out: Path) -> None:
    """Held-out perplexity per source of the exported model."""
    model: Any = LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    model.eval()
    for source in data.SOURCES:
        log_line(
            work, {"perplexity": source, "value": round(perplexity(model, np.load(work / f"{source}.heldout.npy")), 2)}
        )


def main() -> None:
    """Parse the command line and run the phases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds corpora/ and, optionally, extra/")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder: token streams and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("bases/tiny"), help="where the model goes")
    parser.add_argument("--minutes", type=float, default=90.0, help="training time over all runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--export-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.export_only:
        prepare(args.data, args.work, args.seed)
        if not train(args.work, args.out, args.minutes, args.seed, args.threads):
            return
    export(args.work, args.out)
    report(args.work, args.out)


if __name__ == "__main__":
    main()
