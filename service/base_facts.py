"""Which base an adapter belongs to, as its note says it. Knows the base's description, not its weights."""

from __future__ import annotations

from typing import Any

from service.engine.base_description import BaseDescription


def base_facts(base: BaseDescription) -> dict[str, Any]:
    return {
        "name": base.name,
        "fingerprint": base.fingerprint,
        "quantization": base.quantization.value,
        "max_model_len": base.max_model_len,
    }
