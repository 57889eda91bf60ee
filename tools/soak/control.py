"""What tenants do besides asking: files, jobs, models, aliases, feedback, keys. Keeps what was acknowledged."""

from __future__ import annotations

import json
from typing import Any

from tools.soak.tenant import FINISHED, Tenant

MAX_JOBS = 6
"""Unfinished ones, of all tenants together."""
MAX_FILES, MAX_MODELS = 6, 5
JOB = "/v1/fine_tuning/jobs"


async def upload(tenant: Tenant) -> None:
    if len(tenant.files) >= MAX_FILES:
        await delete_file(tenant)
        return
    colours = ("red", "green", "yellow", "brown")
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"colour of {tenant.name} pear {tenant.rng.randint(0, 10**6)}?"},
                {"role": "assistant", "content": colours[number % 4]},
            ]
        }
        for number in range(12)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    body = await _do(
        tenant, "upload", "POST", "/v1/files", files={"file": ("t.jsonl", content)}, data={"purpose": "fine-tune"}
    )
    if body is not None:
        tenant.files.add(body["id"])
        right = (body["bytes"], body["object"]) == (len(content), "file")
        tenant.shared.caller.ledger.expect(right, "a file has the bytes that were sent", body)


async def list_files(tenant: Tenant) -> None:
    body = await _do(tenant, "list files", "GET", "/v1/files?limit=100")
    if body is not None:
        _still_there(tenant, "files", tenant.files, {item["id"] for item in body["data"]})


async def read_file(tenant: Tenant) -> None:
    if tenant.files:
        file_id = tenant.rng.choice(sorted(tenant.files))
        response = await tenant.shared.caller.send("file content", "GET", f"/v1/files/{file_id}/content", tenant.key)
        if response is not None:
            right = response.content.count(b"\n") == 12 and tenant.name.encode() in response.content
            tenant.shared.caller.ledger.expect(right, "a file's content is the tenant's own", response.content)


async def delete_file(tenant: Tenant) -> None:
    if not tenant.files:
        return
    file_id = tenant.rng.choice(sorted(tenant.files))
    tenant.files.discard(file_id)
    if await _do(tenant, "delete file", "DELETE", f"/v1/files/{file_id}", expect=(200, 400)) is None:  # or in use
        tenant.unsure.add(file_id)


async def file_report(tenant: Tenant) -> None:
    if tenant.files:
        file_id = tenant.rng.choice(sorted(tenant.files))
        await _do(tenant, "file report", "POST", f"/v1/files/{file_id}/report")


async def create_job(tenant: Tenant) -> None:
    if tenant.shared.num_jobs >= MAX_JOBS or not tenant.files or len(tenant.models) >= MAX_MODELS:
        return
    tenant.shared.num_jobs += 1
    tuned: dict[str, Any] = {
        "model": "soaked",
        "training_file": tenant.rng.choice(sorted(tenant.files)),
        "suffix": "soak",
        "seed": tenant.rng.randint(0, 1000),
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "lora_r": 4}},
        },
        "evaluation": {"max_examples": 2, "num_shots": 1, "max_seconds": 5},
    }
    if tenant.rng.random() < 0.3:
        tuned |= {"alias": "best", "gate": "off"}
    body = await _do(tenant, "create job", "POST", JOB, json=tuned)
    if body is None:
        tenant.shared.num_jobs -= 1
    else:
        tenant.jobs[body["id"]] = body["status"]


async def look_at_jobs(tenant: Tenant) -> None:
    for job_id in [job_id for job_id, status in tenant.jobs.items() if status not in FINISHED]:
        body = await _do(tenant, "look at job", "GET", f"{JOB}/{job_id}")
        if body is None:
            continue
        await _saw(tenant, body)
        await _do(tenant, "job events", "GET", f"{JOB}/{job_id}/events")


async def steer_job(tenant: Tenant) -> None:
    """Pause, resume or cancel; the job may have finished meanwhile."""
    unfinished = sorted(job_id for job_id, status in tenant.jobs.items() if status not in FINISHED)
    if unfinished:
        verb = tenant.rng.choice(["pause", "resume", "resume", "resume", "cancel"])
        job_id = tenant.rng.choice(unfinished)
        body = await _do(tenant, f"{verb} job", "POST", f"{JOB}/{job_id}/{verb}", expect=(200, 400))
        if body is not None:
            await _saw(tenant, body)


async def import_model(tenant: Tenant) -> None:
    if len(tenant.models) >= MAX_MODELS:
        return
    body = await _do(
        tenant,
        "import",
        "POST",
        "/v1/adapters",
        files={"file": ("adapter.zip", tenant.shared.adapter.read_bytes())},
        data={"suffix": f"s{tenant.rng.randint(0, 99)}"},
    )
    if body is not None:
        tenant.models.add(body["id"])
        tenant.unsure.discard(body["id"])


async def export_model(tenant: Tenant) -> None:
    if tenant.models:
        model = tenant.rng.choice(sorted(tenant.models))
        response = await tenant.shared.caller.send("export", "GET", f"/v1/adapters/{model}/export", tenant.key)
        if response is not None:
            tenant.shared.caller.ledger.expect(
                response.content[:2] == b"PK", "an export is a zip", response.content[:9]
            )


async def list_models(tenant: Tenant) -> None:
    body = await _do(tenant, "list models", "GET", "/v1/models")
    if body is not None:
        _still_there(tenant, "models", tenant.models, {item["id"] for item in body["data"]})


async def delete_model(tenant: Tenant) -> None:
    idle = sorted(tenant.models - tenant.in_use)
    if len(idle) < 2:
        return
    model = tenant.rng.choice(idle)
    tenant.models.discard(model)
    if await _do(tenant, "delete model", "DELETE", f"/v1/models/{model}", expect=(200, 400)) is None:
        tenant.unsure.add(model)


async def set_alias(tenant: Tenant) -> None:
    if tenant.models and tenant.canary is None:
        model = tenant.rng.choice(sorted(tenant.models))
        body = await _do(tenant, "set alias", "PUT", "/v1/aliases/best", json={"model": model})
        if body is not None:
            tenant.alias = body["model"]


async def roll_back(tenant: Tenant) -> None:
    if tenant.alias is not None and tenant.canary is None:
        body = await _do(tenant, "rollback", "POST", "/v1/aliases/best/rollback", expect=(200, 400, 404))
        if body is not None:
            tenant.alias = body["model"]


async def canary(tenant: Tenant) -> None:
    """Start one, look at it, or end it. It may have ended by itself: the alias moved, or a kill made it look bad."""
    if tenant.canary is not None:
        verb = tenant.rng.choice(["GET", "DELETE"])
        response = await tenant.shared.caller.send(
            "canary", verb, "/v1/aliases/best/canary", tenant.key, expect=(200, 404)
        )
        if response is not None and (verb == "DELETE" or response.status_code == 404):
            tenant.canary = None
        return
    others = sorted(tenant.models - tenant.in_use)
    if tenant.alias is None or not others or tenant.has_unfinished_jobs:
        return
    chosen = tenant.rng.choice(others)
    body = await _do(tenant, "start canary", "PUT", "/v1/aliases/best/canary", json={"model": chosen, "percent": 50})
    if body is not None:
        tenant.canary = chosen


async def feedback(tenant: Tenant) -> None:
    if tenant.completions:
        said = {"completion_id": tenant.rng.choice(tenant.completions), "rating": "up"}
        await _do(tenant, "feedback", "POST", "/v1/feedback", json=said)


async def watch(tenant: Tenant) -> None:
    path = tenant.rng.choice(["/v1/drift", "/v1/drift_events", "/v1/quality", "/v1/usage?start_time=0", "/v1/keys"])
    await _do(tenant, "reads", "GET", path, expect=(200, 400) if "usage" in path else (200,))


async def rotate_key(tenant: Tenant) -> None:
    """What is lost with the answer is the key: an administrator helps."""
    body = await _do(tenant, "rotate key", "POST", f"/v1/keys/{tenant.key_id}/rotate")
    if body is None:
        await renew_key(tenant)
    else:
        old, tenant.key, tenant.key_id = tenant.key, body["api_key"], body["id"]
        await tenant.shared.caller.send("refused: old key", "GET", "/v1/models", old, expect=(401,))


async def renew_key(tenant: Tenant) -> None:
    path = f"/v1/admin/tenants/{tenant.id}/keys/additional"
    caller, admin = tenant.shared.caller, tenant.shared.admin_key
    while (body := await caller.json("new key", "POST", path, admin, json={"role": "admin"})) is None:
        pass
    tenant.key, tenant.key_id = body["api_key"], body["id"]


async def refresh(tenant: Tenant) -> None:
    """After a kill: what was cut short is looked up, and what was acknowledged has to be there."""
    await list_files(tenant)
    await list_models(tenant)
    body = await _do(tenant, "list aliases", "GET", "/v1/aliases")
    if body is not None:
        tenant.alias = next((item["model"] for item in body["data"] if item["id"] == "best"), None)
    if tenant.alias is not None:
        found = await _do(tenant, "canary", "GET", "/v1/aliases/best/canary", expect=(200, 404))
        tenant.canary = None if found is None else found["model"]
    await cancel_jobs(tenant, but_known=True)
    await look_at_jobs(tenant)


async def cancel_jobs(tenant: Tenant, but_known: bool = False) -> None:
    """So that all becomes quiet; or only those whose making was cut short."""
    body = await _do(tenant, "list jobs", "GET", f"{JOB}?limit=100")
    for item in [] if body is None else body["data"]:
        if item["status"] not in FINISHED and not (but_known and item["id"] in tenant.jobs):
            ended = await _do(tenant, "cancel job", "POST", f"{JOB}/{item['id']}/cancel", expect=(200, 400))
            tenant.jobs.setdefault(item["id"], item["status"])
            if ended is not None:
                await _saw(tenant, ended)


async def _saw(tenant: Tenant, body: dict[str, Any]) -> None:
    """What has become of a job."""
    before, status = tenant.jobs.get(body["id"]), body["status"]
    tenant.jobs[body["id"]] = status
    if status not in FINISHED or before in FINISHED:
        return
    tenant.shared.num_jobs = max(0, tenant.shared.num_jobs - 1)
    tenant.shared.caller.ledger.count("jobs", status)
    tenant.shared.caller.ledger.expect(status != "failed", "a job does not fail", body.get("error"))
    if status == "succeeded":
        tenant.models.add(body["fine_tuned_model"])
        found = await _do(tenant, "list aliases", "GET", "/v1/aliases")
        if found is not None:
            tenant.alias = next((item["model"] for item in found["data"] if item["id"] == "best"), None)


async def _do(tenant: Tenant, operation: str, method: str, path: str, **options: Any) -> dict[str, Any] | None:
    return await tenant.shared.caller.json(operation, method, path, tenant.key, **options)


def _still_there(tenant: Tenant, what: str, acknowledged: set[str], listed: set[str]) -> None:
    lost = acknowledged - listed
    tenant.shared.caller.ledger.expect(not lost, f"acknowledged {what} are there", (tenant.name, lost))
    acknowledged &= listed
