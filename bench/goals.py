"""What each ratio has to pass, on CPU and on a GPU, with the best reference of the field. Knows no measurement."""

from __future__ import annotations

from bench.measurement import Goal

_DISTINCT = "LoRAX 0.72 (graphs), vLLM 0.76-0.92, on GPUs"

_EVERYWHERE = {
    "idle ÷ base": Goal("≥", 0.99, "vLLM 0.986"),
    "measured ÷ base": Goal("≥", 0.99, ""),
    "32 distinct ÷ one": Goal("≥", 0.97, "Punica 1.01"),
    "2000 registered ÷ 5 registered": Goal("≥", 0.97, "S-LoRA 0.945"),
    "first token, 2 adapters per slot ÷ 1": Goal("≤", 2.0, "SGLang 158, PEFT LRU 44"),
    "p99 between tokens during swaps ÷ before": Goal("≤", 1.1, ""),
    "p99 first token beside a flood ÷ alone, 1 client": Goal("≤", 2.0, ""),
    "p99 first token beside a flood ÷ alone, 8 clients": Goal("≤", 2.0, ""),
    "HTTP ÷ engine": Goal("≥", 0.95, ""),
    **{
        f"{what} watched ÷ not, {clients}": Goal("≤", 1.01, "")
        for what in ("first token", "answer", "computing")
        for clients in ("1 client", "4 clients")
    },
    "training ÷ PEFT": Goal("≥", 2.0, "Unsloth 2 (vendor), packing 3.4 (torchtune)"),
    **{f"p99 ÷ no training, {load} % load, target": Goal("≤", 1.25, "") for load in (25, 50, 75, 100)},
    "training kept, 0 % load, target": Goal("≥", 0.97, ""),
    "training kept, 50 % load, target": Goal("≥", 0.80, "FlexLLM 0.76"),
    **{
        f"training kept ÷ idle part, {load} % load, target": Goal("≥", 0.80, "FlexLLM 0.76")
        for load in (25, 50, 75, 100)
    },
    "memory that training adds ÷ a second QLoRA process": Goal("≤", 0.2, "FlexLLM 0.2"),
    "predicted ÷ actual, time": Goal("±", 0.25, ""),
    "predicted ÷ actual, tokens": Goal("±", 0.25, ""),
    "predicted ÷ actual, memory": Goal("±", 0.25, ""),
}
_TOGETHER = "mLoRA 1.35-1.58"
_CPU = {
    "4 jobs together ÷ one after another": Goal("≥", 1.0, _TOGETHER),
    "32 distinct ÷ base": Goal("≥", 0.75, _DISTINCT),
    "engine 32 distinct ÷ PEFT adapter_names": Goal("≥", 8.0, "S-LoRA 32 at n = 100 (A100)"),
}
_CUDA = {
    "4 jobs together ÷ one after another": Goal("≥", 1.5, _TOGETHER),
    "32 distinct ÷ base": Goal("≥", 0.90, _DISTINCT),
    "engine 32 distinct ÷ PEFT adapter_names": Goal("≥", 32.0, "S-LoRA 32 at n = 100 (A100)"),
}


def goal(name: str, *, cuda: bool) -> Goal | None:
    """None: a ratio that is shown for information."""
    return (_EVERYWHERE | (_CUDA if cuda else _CPU)).get(name)
