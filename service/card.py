"""An adapter's card: what it rests on, how it was measured, where it comes from, how an answer is verified.

Made of what is kept with the version (`service.provenance`, metrics) and of what aliases did since. Knows no HTTP and
no tensors. Whatever an evaluation reports goes through unread, so the card need not follow each new figure.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from service.aliases import AliasMove
from service.versions import AdapterVersion

MERGED_NOTE = (
    "This adapter is served beside the base, never merged into it. A merged copy (POST /v1/adapters/{model}/merge)"
    " answers slightly differently: its weights are rounded once more."
)


def make_card(
    version: AdapterVersion,
    *,
    moves: Sequence[tuple[str, AliasMove]],
    active: Sequence[str],
    files: Mapping[str, Any] | None,
    url: str,
    stale: bool = False,
) -> dict[str, Any]:
    """JSON values. `stale`: the loaded base is another than the adapter's. `files` is the store's list of the adapter's
    files, `url` where the reader reached the service."""
    note = dict(version.provenance or {})
    return {
        "object": "adapter.card",
        "model": version.id,
        "digest": version.digest,
        "created_at": int(version.created_at),
        "stale": stale,
        "data": _data(note),
        "measurement": _measurement(version),
        "history": _history(version, note, moves, active),
        "verification": _verification(version, note, files, url),
    }


def _data(note: Mapping[str, Any]) -> dict[str, Any]:
    if note.get("origin") == "import":
        told = "Imported: what data it was trained on is not known here."
        return {"origin": "import", "note": told, "archive": note.get("received")}
    return {"origin": note.get("origin"), **note.get("data", {}), "report": note.get("data_report")}


def _measurement(version: AdapterVersion) -> dict[str, Any]:
    metrics = dict(version.metrics)
    evaluation = metrics.pop("evaluation", None)
    reference = _drift_reference(metrics.pop("drift_reference", None))
    found = {name: _found(name, metrics, evaluation) for name in ("gate", "forgetting")}
    rest = {name: value for name, value in metrics.items() if name not in found}
    return {**rest, **found, "drift_reference": reference, "evaluation": evaluation}


def _drift_reference(facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """What this adapter's prompts are compared with, and what is promised of the comparison."""
    if facts is None:
        return {"made": False, "promise": "None: the prompts of this adapter are not watched for drift."}
    promise = (
        "While prompts stay as they were in training, one false alarm in"
        f" {facts['run_length']:g} observed prompts is expected."
    )
    return {"made": True, "num_prompts": facts["num_prompts"], "run_length": facts["run_length"], "promise": promise}


def _found(name: str, metrics: Mapping[str, Any], evaluation: Any) -> Any:
    """Beside the evaluation, or within it."""
    return metrics.get(name, evaluation.get(name) if isinstance(evaluation, dict) else None)


def _history(
    version: AdapterVersion, note: Mapping[str, Any], moves: Sequence[tuple[str, AliasMove]], active: Sequence[str]
) -> dict[str, Any]:
    job = note.get("job") or {}
    spec = job.get("spec") or {}
    base = note.get("base") or {"name": version.base_model, "fingerprint": version.base_fingerprint}
    return {
        "created_at": int(version.created_at),
        "job": version.job_id or job.get("id"),
        "step": version.step,
        "parents": note.get("parents", []),
        "base": {**base, "checked_by": note["base_check"]} if "base_check" in note else base,
        "declared": note.get("declared"),
        "method": spec.get("method"),
        "seed": spec.get("seed"),
        "hyperparameters": note.get("resolved") or spec.get("hyperparameters"),
        "software": note.get("software"),
        "compute": note.get("compute"),
        "aliases": list(active),
        "alias_moves": [
            {"alias": alias, "kind": move.kind.value, "created_at": int(move.created_at)} for alias, move in moves
        ],
    }


def _verification(
    version: AdapterVersion, note: Mapping[str, Any], files: Mapping[str, Any] | None, url: str
) -> dict[str, Any]:
    reproduce = None
    if note.get("origin") == "job":
        reproduce = f"rootstock adapters reproduce {shlex.quote(version.id)} --data-dir DIR"
    return {
        "digest": version.digest,
        "files": files,
        "header": "x-rootstock-adapter",
        "steps": [
            "Every answer of this adapter carries its digest in the header x-rootstock-adapter, and names the model"
            f" {version.id} in its body, also where an alias was asked.",
            "Send the request below twice. The same seed (or temperature 0) gives the same text and the same"
            " log-probabilities, whatever else the service answers meanwhile.",
            "Log-probabilities are the adapted model's own, before temperature and penalties.",
            "The digest is the SHA-256 of the list of the adapter's files with their SHA-256 (below), as compact JSON"
            ' {"files":{name:{"bytes","sha256"}},"version":1} with sorted keys. Export the adapter and compare;'
            " an export holds config and weights, a drift reference stays here.",
        ],
        "curl": _curl(version.id, url),
        "export": _authorised(f"{url}/v1/adapters/{version.id}/export", "-o adapter.zip"),
        "reproduce": reproduce,
        "merged": MERGED_NOTE,
    }


def _curl(model: str, url: str) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0,
        "seed": 1,
        "max_tokens": 16,
        "logprobs": True,
        "top_logprobs": 1,
    }
    options = f"-i -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    return _authorised(f"{url}/v1/chat/completions", options)


def _authorised(url: str, options: str) -> str:
    """The key comes from the reader's environment; none is ever written here."""
    return f'curl -s {shlex.quote(url)} -H "Authorization: Bearer $ROOTSTOCK_API_KEY" {options}'
