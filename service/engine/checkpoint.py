"""Reads a Hugging Face checkpoint, local or from the hub: config, weights, tokenizer. No code from it is run.

Knows transformers' ways of failing, and says instead what is wrong and the way out. Knows no quantization.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from service.engine.attention import register_attention
from service.engine.errors import BaseModelError

# Entries of config.json that say nothing about what the model computes.
_INCIDENTAL = {"transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}

_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class Checkpoint:
    """What was read, as it was saved: nothing is quantized, and everything is in host memory."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    fingerprint: str
    max_model_len: int


def read_checkpoint(path_or_hub_id: str, dtype: torch.dtype | None) -> Checkpoint:
    """`dtype` is that of the weights in memory; None keeps the checkpoint's.

    Raises:
        BaseModelError: nothing there, no tokenizer, no safetensors, or not a decoder this service can run.
    """
    source, is_local = _locate(path_or_hub_id)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": is_local}
    with _quietly():
        config = _read_config(source, options)
        tokenizer = _read_tokenizer(source, options)
        model = _read_model(source, config, dtype, options)
    model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    raw, _ = PretrainedConfig.get_config_dict(source, local_files_only=is_local)
    _check_vocabulary(model, tokenizer)
    return Checkpoint(model, tokenizer, _fingerprint(raw, model), _max_length(config))


def read_tokenizer(path_or_hub_id: str) -> tuple[Tokenizer, PretrainedConfig, int]:
    """What is known of a base without its weights: tokenizer, config, longest sequence. Raises BaseModelError."""
    source, is_local = _locate(path_or_hub_id)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": is_local}
    with _quietly():
        config = _read_config(source, options)
        return _read_tokenizer(source, options), config, _max_length(config)


def base_config(path_or_hub_id: str) -> dict[str, Any]:
    """The base's config.json with transformers' defaults filled in; no weights are read. Raises BaseModelError."""
    source, is_local = _locate(path_or_hub_id)
    return _read_config(source, {"trust_remote_code": False, "local_files_only": is_local}).to_dict()


def _locate(path_or_hub_id: str) -> tuple[str, bool]:
    """(directory or hub id, whether it is a directory)."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseModelError(f"base {path_or_hub_id!r} holds no config.json: it is not a model directory")
        return str(path), True
    if path.exists():
        raise BaseModelError(f"base {path_or_hub_id!r} is a file; name the model's directory")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path_or_hub_id):
        raise BaseModelError(f"base {path_or_hub_id!r} does not exist, and is no hub id either")
    return path_or_hub_id, False


def _read_config(source: str, options: dict[str, Any]) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"base {source!r}: no usable config: {_first_line(error)}") from error
    if config.is_encoder_decoder:
        raise BaseModelError(f"base {source!r} ({config.model_type}) is an encoder-decoder; a causal LM is needed")
    if getattr(config, "quantization_config", None) is not None:
        raise BaseModelError(
            f"base {source!r} is a quantized checkpoint; name the original, it is quantized while loading"
        )
    return config


def _read_tokenizer(source: str, options: dict[str, Any]) -> Tokenizer:
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # each tokenizer class fails in its own way when files are missing
        raise BaseModelError(f"base {source!r} has no usable tokenizer: {_first_line(error)}") from error
    if not tokenizer.is_fast or len(tokenizer) == 0:
        raise BaseModelError(f"base {source!r} has no usable tokenizer: tokenizer.json is needed")
    return tokenizer


def _read_model(
    source: str, config: PretrainedConfig, dtype: torch.dtype | None, options: dict[str, Any]
) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=register_attention(),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BaseModelError(f"base {source!r} ({config.model_type}) cannot be loaded: {_first_line(error)}") from error
    model: PreTrainedModel
    model, report = loaded  # a pair, because of output_loading_info
    lost = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if lost:
        raise BaseModelError(f"base {source!r}: weights missing or of another shape: {', '.join(lost[:4])}")
    if not model._supports_attention_backend:
        raise BaseModelError(
            f"base {source!r}: {type(model).__name__} does not use transformers' attention interface, so its keys and"
            " values cannot be kept here"
        )
    return model


def _check_vocabulary(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    rows: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    added = tokenizer.added_tokens_decoder  # a padding token, say, that nobody asks the model about
    highest = max((token_id for token_id in tokenizer.get_vocab().values() if token_id not in added), default=0)
    if highest >= rows:
        raise BaseModelError(f"the tokenizer has ids up to {highest}, the model only {rows} embeddings")


def _max_length(config: PretrainedConfig) -> int:
    """The longest sequence whose positions the base knows.

    Where rotary frequencies change with the length, only the unchanged range: one long sequence would otherwise
    change what the others in its batch compute.
    """
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int):
        raise BaseModelError(f"{config.model_type}: config.json names no max_position_embeddings")
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
        limit = rope.get("original_max_position_embeddings") or limit
    return limit


def _fingerprint(raw_config: dict[str, Any], model: PreTrainedModel) -> str:
    """sha256 over the config and every weight as bfloat16.

    So it names the weights whatever the quantization, dtype or device they are loaded with: an adapter fits them all.
    """
    essentials = {k: v for k, v in raw_config.items() if k not in _INCIDENTAL and not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(essentials, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(tensor_bytes(parameter.to(torch.bfloat16)))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a tensor, row by row, wherever it is."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars of transformers meanwhile."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
