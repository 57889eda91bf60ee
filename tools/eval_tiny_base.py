"""Judge a base the way a tenant would: greedy exact match on a task before and after LoRA.

    python -m tools.eval_tiny_base --base bases/tiny --task TASK_DIR --rows 3000 --epochs 14 --lr 2e-3

TASK_DIR holds ``train.jsonl`` and ``validation.jsonl`` with ``input`` and ``output`` per line. The linear
layers are rounded through NF4 first, so the numbers are those of the quantized base that is served; the
adapters see the de-quantized weights because the CPU kernels of 4-bit layers may not pass gradients on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Token ids of one training row; only the answer and its end mark are learnt."""

    ids: list[int]
    labels: list[int]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def round_to_nf4(model: Any) -> None:
    """Replace every linear weight but the output layer by what NF4 with double quantization keeps of it."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            packed, state = quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            module.weight.data = dequantize_4bit(packed, state).to(module.weight.dtype)


def prompt_ids(tokenizer: Any, user: str, shots: list[dict[str, str]]) -> list[int]:
    """The chat template up to where the assistant begins; shots become earlier turns."""
    messages = []
    for shot in shots:
        messages += [{"role": "user", "content": shot["input"]}, {"role": "assistant", "content": shot["output"]}]
    messages.append({"role": "user", "content": user})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def make_example(tokenizer: Any, row: dict[str, str]) -> Example:
    """One row as ids and labels."""
    prompt = prompt_ids(tokenizer, row["input"], [])
    answer = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Example(prompt + answer, [IGNORED] * len(prompt) + answer)


def batches(examples: list[Example], size: int, rng: random.Random) -> list[list[Example]]:
    """Shuffled batches of similar length: little padding, still random."""
    order = sorted(rng.sample(examples, len(examples)), key=lambda e: len(e.ids) + rng.randint(0, 6))
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(groups)
    return groups


def batch_loss(model: Any, group: list[Example], pad: int) -> torch.Tensor:
    """Loss on answer tokens; the output layer is applied at those positions only."""
    width = max(len(e.ids) for e in group)
    ids = torch.tensor([e.ids + [pad] * (width - len(e.ids)) for e in group])
    labels = torch.tensor([e.labels + [IGNORED] * (width - len(e.labels)) for e in group])
    inner = model.base_model.model
    with torch.autocast("cpu", torch.bfloat16):
        hidden = inner.model(input_ids=ids[:, :-1]).last_hidden_state
        wanted = labels[:, 1:]
        logits = inner.lm_head(hidden[wanted != IGNORED])
    return functional.cross_entropy(logits.float(), wanted[wanted != IGNORED])


def train_lora(model: Any, examples: list[Example], args: argparse.Namespace, pad: int) -> None:
    """AdamW, short warm-up, cosine to a tenth."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, args.beta2), weight_decay=args.decay)
    rng, step = random.Random(args.seed), 0
    total = args.epochs * math.ceil(len(examples) / args.batch)
    wall, cpu = time.monotonic(), time.process_time()
    model.train()
    for epoch in range(args.epochs):
        seen = 0.0
        for group in batches(examples, args.batch, rng):
            warm = min(1.0, (step + 1) / max(1, args.warmup * total))
            lr = args.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / total)))
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            loss = batch_loss(model, group, pad)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen, step = seen + loss.item() * len(group), step + 1
        spent = f"wall {time.monotonic() - wall:.0f} s, cpu {(time.process_time() - cpu) / 2:.0f} s x 2"
        print(f"epoch {epoch + 1}: loss {seen / len(examples):.3f}, {spent}", flush=True)


@torch.inference_mode()
def exact_match(model: Any, tokenizer: Any, rows: list[dict[str, str]], shots: list[dict[str, str]]) -> float:
    """Share of rows whose greedy answer is the expected one."""
    model.eval()
    hits = 0
    order = sorted(rows, key=lambda row: len(row["input"]))
    for start in range(0, len(order), 100 if not shots else 20):
        part = order[start : start + (100 if not shots else 20)]
        prompts = [prompt_ids(tokenizer, row["input"], shots) for row in part]
        width = max(map(len, prompts))
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        made = model.generate(input_ids=ids, attention_mask=(ids != pad).long(), max_new_tokens=20, do_sample=False)
        texts = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        hits += sum(text.strip() == row["output"] for text, row in zip(texts, part, strict=True))
    return hits / len(rows)


def main() -> None:
    """Base, few-shot and LoRA accuracy of one base on one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--task", type=Path, required=True, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--validation", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--alpha", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of all steps")
    parser.add_argument("--beta2", type=float, default=0.99)
    parser.add_argument("--decay", type=float, default=0.0)
    parser.add_argument("--shots", type=int, default=0, help="also measure a few-shot prompt of this many rows")
    parser.add_argument("--prompt-only", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model: Any = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16)
    round_to_nf4(model)
    rows = random.Random(args.seed).sample(read_rows(args.task / "train.jsonl"), args.rows)
    held = read_rows(args.task / "validation.jsonl")[: args.validation]
    if args.prompt_only or args.shots:
        print(f"base: {exact_match(model, tokenizer, held, []):.3f}", flush=True)
        print(f"{args.shots}-shot: {exact_match(model, tokenizer, held, rows[: args.shots]):.3f}", flush=True)
    if args.prompt_only:
        return
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout,
                                             target_modules=LINEAR, task_type="CAUSAL_LM"))  # fmt: skip
    train_lora(model, [make_example(tokenizer, row) for row in rows], args, tokenizer.pad_token_id)
    model.merge_adapter()
    print(f"LoRA {vars(args)}: {exact_match(model, tokenizer, held, []):.3f}", flush=True)


if __name__ == "__main__":
    main()
