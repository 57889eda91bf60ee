"""The one base that serves and trains: loaded once, quantized, every linear layer a LoRA site, never changed again.

Knows one model and its tokenizer; nothing of requests, adapters' files or the engine's loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapters.lora import BatchedLoraLinear, LoraPart, graft
from adapters.lora_weights import BaseSignature, LinearShape, TensorIdentity
from service.engine.base_description import BaseDescription
from service.engine.checkpoint import Checkpoint, read_checkpoint, tensor_bytes
from service.engine.errors import BaseModelError
from service.engine.frozen_linear import FrozenLinear, LinearWeights, freeze
from service.engine.quantization import Quantization
from service.engine.sibling_groups import Linear, linear_layers, output_head, sibling_groups

DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""For a base without a chat template: one line per message, `role: content`; an answer ends with the end token."""


@dataclass(frozen=True)
class BaseModel(BaseDescription):
    """A loaded base. `dtype` is that of activations."""

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    lora_sites: Mapping[str, BatchedLoraLinear]

    def parameter_hash(self) -> str:
        """sha256 of everything that must never change: all parameters and saved buffers as they are now."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()


def load_base_model(
    path_or_hub_id: str,
    *,
    quantization: Quantization | str = Quantization.NF4,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    max_model_len: int | None = None,
) -> BaseModel:
    """Load a Hugging Face causal LM by directory or hub id.

    `device` defaults to CUDA when there is one; `dtype` to bfloat16, but unquantized on CPU to the checkpoint's;
    `name` to the directory's name or the hub id; `max_model_len` to the base's own limit.

    Raises:
        BaseModelError: it cannot be loaded as asked; the message names the way out.
    """
    quantization, target = Quantization(quantization), _device(device)
    if dtype is None and (quantization is not Quantization.NONE or target.type == "cuda"):
        dtype = torch.bfloat16
    checkpoint = read_checkpoint(path_or_hub_id, dtype)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    name = name or _default_name(path_or_hub_id)
    linears, head = linear_layers(model), output_head(model)
    shapes = {n: LinearShape(*_weight(linear).shape[::-1]) for n, linear in linears.items()}
    vocab_size = shapes[head].out_features if head in shapes else model.config.get_text_config().vocab_size
    sites = _graft(model, linears, head, quantization, target)
    model.to(target)  # type: ignore[arg-type]
    _check_forward(model, target)
    eos_token_ids = _eos_token_ids(model, tokenizer)
    return BaseModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        quantization=quantization,
        device=target,
        dtype=model.get_input_embeddings().weight.dtype,  # type: ignore[arg-type]
        fingerprint=checkpoint.fingerprint,
        max_model_len=_max_model_len(checkpoint, max_model_len),
        eos_token_ids=eos_token_ids,
        pad_token_id=_pad_token_id(tokenizer, eos_token_ids, vocab_size),
        vocab_size=vocab_size,
        signature=BaseSignature(
            modules=shapes,
            fingerprint=checkpoint.fingerprint,
            names=frozenset({name, path_or_hub_id, _default_name(path_or_hub_id)}),
            head=head,
            embeddings=_embeddings(model, sites, head),
        ),
        activation_bytes=model.get_input_embeddings().weight.dtype.itemsize,  # type: ignore[arg-type]
        lora_sites=sites,
    )


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise BaseModelError(f"--device {device!r} is none: {error}", param="device") from error
    if chosen.type not in ("cpu", "cuda"):
        raise BaseModelError(f"--device {device!r}: a base runs on cpu or cuda", param="device")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise BaseModelError(f"--device {device!r}: there is no such CUDA device here", param="device")
    return chosen


def _default_name(path_or_hub_id: str) -> str:
    path = Path(path_or_hub_id).expanduser()
    return path.resolve().name if path.is_dir() else path_or_hub_id


def _graft(
    model: PreTrainedModel,
    linears: dict[str, Linear],
    head: str | None,
    quantization: Quantization,
    device: torch.device,
) -> dict[str, BatchedLoraLinear]:
    """Freeze every linear layer and make it a site.

    One after the other, and `linears` is emptied on the way: an original is freed once it is replaced, so a large
    base never lies in memory twice.
    """
    groups = sibling_groups(model, linears, head, _probe(model, torch.device("cpu")))
    _check_coverage(model, linears, head, quantization)

    def frozen() -> Iterator[tuple[FrozenLinear, list[LoraPart], int]]:
        for names in groups:
            originals = {name: linears.pop(name) for name in names}
            parts = [LinearWeights(name, _weight(linear), linear.bias) for name, linear in originals.items()]
            held = Quantization.NONE if head in names else quantization
            layer = freeze(parts, held, device)
            yield layer, [LoraPart(p.name, p.weight.shape[0]) for p in parts], layer.in_features

    return graft(model, frozen(), head)


def _weight(linear: Linear) -> torch.Tensor:
    """[out_features, in_features]; GPT-2's Conv1D keeps it the other way round."""
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.T


def _probe(model: PreTrainedModel, device: torch.device) -> torch.Tensor:
    """A few tokens that any vocabulary has."""
    rows: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    return torch.arange(4, device=device)[None] % rows


def _check_coverage(
    model: PreTrainedModel, linears: Mapping[str, Linear], head: str | None, quantization: Quantization
) -> None:
    """Weights outside linear layers (experts kept in one tensor) would silently stay as they are."""
    if quantization is Quantization.NONE:
        return
    inside = {id(linear.weight) for name, linear in linears.items() if name != head}
    left = inside | {id(m.weight) for m in (model.get_input_embeddings(), linears.get(head or "")) if m is not None}
    reached = sum(p.numel() for p in model.parameters() if id(p) in inside)
    if sum(p.numel() for p in model.parameters() if id(p) not in left) > reached:
        raise BaseModelError(
            f"{type(model).__name__} keeps most of its weights outside linear layers, where {quantization} does not"
            " reach; load it with --quantization none",
            param="quantization",
        )


def _check_forward(model: PreTrainedModel, device: torch.device) -> None:
    """Some models look into their linear layers instead of calling them; better now than at the first request."""
    try:
        with torch.inference_mode():
            model(input_ids=_probe(model, device), use_cache=False)
    except AttributeError as error:
        raise BaseModelError(f"{type(model).__name__} reaches into its linear layers: {error}") from error


def _embeddings(
    model: PreTrainedModel, sites: Mapping[str, BatchedLoraLinear], head: str | None
) -> dict[str, TensorIdentity]:
    """Input and output embedding weights by name; the same tensor twice where they are tied."""
    first = model.get_input_embeddings()
    found = {f"{n}.weight": m.weight.detach() for n, m in model.named_modules() if m is first}  # type: ignore[operator]
    if head is not None and head in sites:
        found[f"{head}.weight"] = sites[head].base.weight.detach()  # type: ignore[operator]
    return {name: TensorIdentity.of(tensor) for name, tensor in found.items()}


def _max_model_len(checkpoint: Checkpoint, wanted: int | None) -> int:
    if wanted is not None and wanted > checkpoint.max_model_len:
        raise BaseModelError(
            f"--max-model-len {wanted} is beyond the base's {checkpoint.max_model_len} positions", param="max_model_len"
        )
    return wanted or checkpoint.max_model_len


def _eos_token_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> frozenset[int]:
    """All tokens that end an answer: of the generation config, the config, the tokenizer and the chat template."""
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for value in (
        getattr(generation, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
        _chat_end_token_id(tokenizer),
    ):
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return frozenset(found)


def _chat_end_token_id(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template puts behind an assistant's message, if any."""
    marker = "where-it-ends"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": marker}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, KeyError, ValueError):
        return None
    _, _, tail = text.partition(marker)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return ids[0] if ids and ids[0] in added and added[ids[0]].special else None


def _pad_token_id(tokenizer: Tokenizer, eos_token_ids: frozenset[int], vocab_size: int) -> int:
    """Any id will do where a tokenizer has none, or one that was added behind the model's vocabulary."""
    pad = tokenizer.pad_token_id
    return pad if isinstance(pad, int) and pad < vocab_size else min(eos_token_ids, default=0)
