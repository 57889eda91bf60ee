"""Real prompts as the service measures them: pooled vectors, lengths, NLL by the bundled base. Keeps them in a file.

The vector is that of service/engine/pooling.py: the mean of the last hidden states over all tokens of the rendered
chat, of length one. Here prompts of like length share a batch, since nobody waits for one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAX_TOKENS = 192
TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class Prompts:
    """embeddings: float32 [n, hidden]; length in tokens and mean NLL in nats: float64 [n]."""

    embeddings: NDArray[np.float32]
    length: NDArray[np.float64]
    nll: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.length)

    @property
    def numbers(self) -> dict[str, NDArray[np.float64]]:
        """By signal."""
        return {"prompt_length": self.length, "prompt_nll": self.nll}


class PromptEmbedder:
    """Embeds texts with the base at `base`. `cache`: a folder in which what was embedded is found again; `note`
    is told of progress."""

    def __init__(self, base: Path, cache: Path | None, note: Callable[[str], None]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._salt = hashlib.sha256((base / "model.safetensors").read_bytes()).digest()
        self._cache = cache
        self._note = note
        self._known: dict[str, tuple[NDArray[np.float32], float, float]] = {}

    def embed(self, texts: Sequence[str]) -> Prompts:
        """[n] texts, each as the one user turn of a chat. A text that was met before is not computed again."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            found = self._find_or_compute(new)
            self._note(f"{len(new)} prompts embedded")
            self._known |= zip(new, zip(found.embeddings, found.length, found.nll, strict=True), strict=True)
        embeddings, length, nll = zip(*(self._known[text] for text in texts), strict=True)
        return Prompts(np.stack(embeddings), np.array(length), np.array(nll))

    def _find_or_compute(self, texts: Sequence[str]) -> Prompts:
        key = hashlib.sha256(self._salt + "\0".join(texts).encode()).hexdigest()[:24]
        kept = None if self._cache is None else self._cache / f"{key}.npz"
        if kept is not None and kept.is_file():
            found = np.load(kept)
            return Prompts(found["embeddings"], found["length"], found["nll"])
        prompts = self._compute(texts)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.savez(kept, embeddings=prompts.embeddings, length=prompts.length, nll=prompts.nll)
        return prompts

    def _compute(self, texts: Sequence[str]) -> Prompts:
        rows = self._tokenize(texts)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        embeddings = np.empty((len(rows), self._model.config.hidden_size), dtype=np.float32)
        nll = np.empty(len(rows))
        first = 0
        while first < len(order):
            size = max(1, TOKENS_PER_BATCH // len(rows[order[first]]))
            batch = order[first : first + size]
            embeddings[batch], nll[batch] = self._forward([rows[index] for index in batch])
            first += size
        return Prompts(embeddings, np.array([len(row) for row in rows], dtype=np.float64), nll)

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        render = self._tokenizer.apply_chat_template
        chats = [
            render([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True) for text in texts
        ]
        found = self._tokenizer(chats, add_special_tokens=False, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return [list(row) for row in found]

    def _forward(self, rows: list[list[int]]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Rows padded at the end: no real token of a causal model sees the padding."""
        import torch

        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        with torch.inference_mode():
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
            states = self._model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
            pooled = torch.nn.functional.normalize((states.float() * mask[..., None]).sum(1) / lengths[:, None])
            logits = self._model.lm_head(states[:, :-1]).float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
            mean_nll = (losses * mask[:, 1:]).sum(1) / (lengths - 1)
        return pooled.numpy(), mean_nll.double().numpy()
