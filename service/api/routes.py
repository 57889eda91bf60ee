"""Every router of the API, in the order in which paths are matched."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter

from service.api import (
    adapters,
    admin,
    aliases,
    canaries,
    captures,
    chat,
    completions,
    drift,
    embeddings,
    feedback,
    files,
    fine_tuning,
    gate_policy,
    keys,
    merges,
    models,
    quality,
    retraining,
    settings,
    usage,
)

ROUTERS: Sequence[APIRouter] = tuple(
    module.router
    for module in (
        chat,
        completions,
        embeddings,
        files,
        fine_tuning,
        models,
        merges,
        adapters,
        aliases,
        canaries,
        gate_policy,
        feedback,
        drift,
        settings,
        quality,
        captures,
        retraining,
        usage,
        keys,
        admin,
    )
)
