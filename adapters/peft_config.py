"""PEFT's adapter_config.json, read with every check: what it asks for is served exactly, or refused by name."""

from __future__ import annotations

import json
import re
from typing import Any

from adapters.errors import AdapterFormatError, BaseMismatchError
from adapters.lora_weights import BaseSignature, LoraSpec, layer_index

CONFIG_NAME = "adapter_config.json"

_PATTERN_KEY = re.compile(r"\^?(?:\\\.|[\w.-])+\$?")
"""A module's name or its end. PEFT takes any regular expression here, but one that comes from outside may never end."""

WHY_NO_DORA = (
    "DoRA rescales the base's own output by the norm of W + B A, row by row; here the base's product is shared by all"
    " adapters of a batch, so a DoRA adapter would be served wrongly. Use plain LoRA or use_rslora"
)

# PEFT options that would change what the tensors mean. A value in the tuple is harmless; any other is refused.
_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_bdlora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, {}, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "exclude_modules": (None, []),
}

# Initialisations that leave the base as it was. The others (PiSSA, OLoRA, CorDA, LoftQ, …) change the base's weights:
# what they learned fits no unchanged base, unless PEFT converted it on saving, which sets this to true.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

# What else PEFT writes, that changes nothing once an adapter is trained.
_READ_OR_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


def read_config(content: bytes, base: BaseSignature, max_rank: int) -> LoraSpec:
    """The LoRA that a PEFT directory's configuration file describes. Raises as `read_adapter`."""
    try:
        config = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{CONFIG_NAME} is not JSON: {error}", check="config") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterFormatError("peft_type must be 'LORA'", check="config")
    if config.get("auto_mapping"):
        config.pop("auto_mapping")  # a class name for PEFT's auto models; nothing is imported from it here
    for option, harmless in _ONLY_SUPPORTED.items():
        if option in config and config[option] not in harmless:
            if option == "use_dora":
                raise AdapterFormatError(f"use_dora: {WHY_NO_DORA}", check="unsupported")
            raise AdapterFormatError(f"{option}={_shown(config[option])} is not supported", check="unsupported")
    if config.get("init_lora_weights") not in _HARMLESS_INITS:
        raise AdapterFormatError(
            f"init_lora_weights={_shown(config['init_lora_weights'])} changes the base; save the adapter converted to a"
            " plain LoRA (PEFT: path_initial_model_for_weight_conversion)",
            check="unsupported",
        )
    for option in config.keys() - _ONLY_SUPPORTED.keys() - _READ_OR_HARMLESS:
        if config[option] not in (None, False, [], {}, ""):
            raise AdapterFormatError(f"{option}={_shown(config[option])} is not known here", check="unsupported")
    _check_layers_pattern(config.get("layers_pattern"), base)
    _check_base_name(config.get("base_model_name_or_path"), base)
    return _spec_from_config(config, max_rank)


def _check_layers_pattern(patterns: Any, base: BaseSignature) -> None:
    """PEFT's `layers_pattern` says which list `layers_to_transform` counts; here it is always the outermost."""
    names = [patterns] if isinstance(patterns, str) else patterns or []
    indexed = [name for name in base.modules if layer_index(name) is not None]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterFormatError("layers_pattern is malformed", check="config")
    if names and not all(any(re.match(rf"([^.]+\.)*?{re.escape(n)}\.\d+\.", m) for n in names) for m in indexed):
        raise AdapterFormatError(f"layers_pattern={patterns!r} is not the base's list of layers", check="unsupported")


def _check_base_name(named: Any, base: BaseSignature) -> None:
    if not named or not base.names:
        return
    if not isinstance(named, str):
        raise AdapterFormatError("base_model_name_or_path is not a string", check="config")
    if named in base.names or re.split(r"[/\\]", named.rstrip("/\\"))[-1] in base.names:
        return
    raise BaseMismatchError(f"the adapter was made for base {named!r}; loaded is {' = '.join(sorted(base.names))}")


def _spec_from_config(config: dict[str, Any], max_rank: int) -> LoraSpec:
    targets = config.get("target_modules")
    layers = config.get("layers_to_transform")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    well_formed = (
        _is_int(config.get("r"))
        and _is_number(config.get("lora_alpha", 8))
        and _is_number(config.get("lora_dropout") or 0.0)
        and (isinstance(targets, str) or _is_list_of(targets, str))
        and (layers is None or _is_int(layers) or _is_list_of(layers, int))
        and isinstance(ranks, dict)
        and all(_is_int(v) for v in ranks.values())
        and isinstance(alphas, dict)
        and all(_is_number(v) for v in alphas.values())
    )
    if not well_formed:
        raise AdapterFormatError(
            "r, lora_alpha, target_modules, rank_pattern or alpha_pattern is malformed", check="config"
        )
    for key in (*ranks, *alphas):
        if not _PATTERN_KEY.fullmatch(key):
            raise AdapterFormatError(
                f"the pattern {_shown(key)}: only names of modules are taken, not regular expressions",
                check="unsupported",
            )
    for rank in (config["r"], *ranks.values()):
        if not 1 <= rank <= max_rank:
            raise AdapterFormatError(f"rank {rank} is outside 1..{max_rank}", check="rank")
    if isinstance(targets, str) and targets != "all-linear":
        raise AdapterFormatError(f"target_modules as a regular expression ({_shown(targets)})", check="unsupported")
    return LoraSpec(
        r=config["r"],
        lora_alpha=config.get("lora_alpha", 8),
        target_modules="all-linear" if isinstance(targets, str) else tuple(sorted(targets or ())),
        use_rslora=bool(config.get("use_rslora", False)),
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        layers_to_transform=None
        if layers is None
        else tuple(sorted({layers} if isinstance(layers, int) else {*layers})),
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, kind) for v in value)
