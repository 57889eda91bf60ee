"""/v1/fine_tuning: jobs, and what one would take. Knows the wire; `service.jobs` decides, `service.tuning` works."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request

from service.api.auth import KeyIdDep, TenantDep
from service.api.evaluation_schemas import requested_gate
from service.api.fine_tuning_schemas import MAX_SEED, JobRequest
from service.api.json_body import JsonRoute
from service.api.pages import After, Limit, list_body, only_query
from service.api.services import Services, ServicesDep
from service.errors import InvalidRequestError, NotFoundError
from service.job import Checkpoint, EvaluationSpec, Event, Hyperparameters, Job, JobSpec, Method, Preset
from service.jobs import Idempotency

router = APIRouter(route_class=JsonRoute, prefix="/v1/fine_tuning", tags=["fine-tuning"])

paged = Depends(only_query("after", "limit"))
CHECKPOINT_METRICS = (
    "step",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
    "train_preference_accuracy",
    "train_reward_margin",
    "full_valid_preference_accuracy",
    "full_valid_reward_margin",
)


@router.post("/jobs")
def create_job(
    body: JobRequest,
    tenant: TenantDep,
    key_id: KeyIdDep,
    services: ServicesDep,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
    x_stainless_retry_count: Annotated[str | None, Header()] = None,
) -> dict[str, Any]:
    spec = _spec(body, tenant.id, services)
    idempotency = _idempotency(body, idempotency_key, x_stainless_retry_count)
    return job_body(services.jobs.create(tenant.id, spec, idempotency, key_id=key_id))


@router.post("/estimate")
def estimate_job(body: JobRequest, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """What such a job would take. Outside of the event loop: it reads the whole file."""
    made = services.estimates.make(tenant.id, _spec(body, tenant.id, services))
    return {"object": "fine_tuning.estimate", "model": body.model, **made.as_dict()}


@router.get("/jobs", dependencies=[Depends(only_query("after", "limit", "metadata", prefixes=("metadata[",)))])
def list_jobs(
    request: Request, tenant: TenantDep, services: ServicesDep, after: After = None, limit: Limit = 20
) -> dict[str, Any]:
    page = services.jobs.list(tenant.id, after=after, limit=limit, metadata=_metadata_filter(request))
    return list_body([job_body(job) for job in page.items], has_more=page.has_more)


@router.get("/jobs/{job_id}")
def get_job(job_id: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return job_body(services.jobs.get(tenant.id, job_id))


@router.post("/jobs/{job_id}/cancel")
def cancel_job(job_id: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return job_body(services.jobs.cancel(tenant.id, job_id))


@router.post("/jobs/{job_id}/pause")
def pause_job(job_id: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return job_body(services.jobs.pause(tenant.id, job_id))


@router.post("/jobs/{job_id}/resume")
def resume_job(job_id: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    return job_body(services.jobs.resume(tenant.id, job_id))


@router.get("/jobs/{job_id}/events", dependencies=[paged])
def list_events(
    job_id: str, tenant: TenantDep, services: ServicesDep, after: After = None, limit: Limit = 20
) -> dict[str, Any]:
    page = services.jobs.events(tenant.id, job_id, after=after, limit=limit)
    return list_body([event_body(event) for event in page.items], has_more=page.has_more)


@router.get("/jobs/{job_id}/checkpoints", dependencies=[paged])
def list_checkpoints(
    job_id: str, tenant: TenantDep, services: ServicesDep, after: After = None, limit: Limit = 10
) -> dict[str, Any]:
    page = services.jobs.checkpoints(tenant.id, job_id, after=after, limit=limit)
    return list_body([checkpoint_body(checkpoint) for checkpoint in page.items], has_more=page.has_more)


@router.get("/jobs/{job_id}/report")
def get_data_report(job_id: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    report = services.jobs.data_report(tenant.id, job_id)
    if report is None:
        raise NotFoundError(f"The job '{job_id}' has no data report yet.", param="job_id", code="report_not_ready")
    return {"object": "fine_tuning.job.report", "job_id": job_id, **report}


@router.get("/jobs/{job_id}/evaluation", dependencies=[Depends(only_query())])
def get_evaluation(job_id: str, tenant: TenantDep, services: ServicesDep) -> dict[str, Any]:
    """What the comparison before publication found, and what the gate made of it."""
    job = services.jobs.get(tenant.id, job_id)
    if job.fine_tuned_model is None:
        raise NotFoundError(
            f"Job '{job_id}' is {job.status}: there is an evaluation when it has succeeded.",
            param="job_id",
            code="evaluation_not_found",
        )
    report = services.registry.version(tenant.id, job.fine_tuned_model).metrics.get("evaluation") or {}
    return {"object": "fine_tuning.job.evaluation", "job": job.id, "model": job.fine_tuned_model, **report}


def job_body(job: Job) -> dict[str, Any]:
    """OpenAI's job, with `paused`, `preset`, `estimate`, `alias`, `strict`, `evaluation` and `gate` beside it."""
    hyperparameters = {**job.spec.hyperparameters.as_dict(), **(job.resolved or {})}
    del hyperparameters["kl_to_base" if job.spec.method is Method.DPO else "beta"]
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "model": job.spec.model,
        "status": job.status,
        "paused": job.paused,
        "hyperparameters": hyperparameters,
        "method": {"type": job.spec.method, job.spec.method: {"hyperparameters": hyperparameters}},
        "preset": job.spec.preset,
        "organization_id": job.tenant_id,
        "result_files": list(job.result_files),
        "seed": job.spec.seed,
        "suffix": job.spec.suffix,
        "training_file": job.spec.training_file,
        "validation_file": job.spec.validation_file,
        "fine_tuned_model": job.fine_tuned_model,
        "finished_at": _seconds(job.finished_at),
        "estimated_finish": _seconds(job.estimated_finish),
        "trained_tokens": job.trained_tokens,
        "estimate": None if job.estimate is None else dict(job.estimate),
        "error": None if job.error is None else {**job.error.__dict__},
        "integrations": [],
        "metadata": None if job.spec.metadata is None else dict(job.spec.metadata),
        "alias": job.spec.alias,
        "strict": job.spec.strict,
        "evaluation": evaluation_body(job.spec.evaluation),
        "gate": job.spec.gate.as_dict(),
    }


def evaluation_body(spec: EvaluationSpec) -> dict[str, Any]:
    """The options as they were asked for, defaults filled in."""
    assertions = [assertion.as_dict() for assertion in spec.assertions]
    return {**spec.__dict__, "task": spec.task or "auto", "assertions": assertions}


def event_body(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": None if event.data is None else dict(event.data),
    }


def checkpoint_body(checkpoint: Checkpoint) -> dict[str, Any]:
    metrics = {name: checkpoint.metrics[name] for name in CHECKPOINT_METRICS if name in checkpoint.metrics}
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(checkpoint.created_at),
        "fine_tuned_model_checkpoint": checkpoint.model_id,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, **metrics},
    }


def _spec(body: JobRequest, tenant_id: str, services: Services) -> JobSpec:
    hyperparameters = body.requested
    _check_rank(hyperparameters, services.settings.max_lora_rank)
    model = services.registry.resolve(tenant_id, body.model)
    return JobSpec(
        model=model.id,
        base_model=services.registry.base.name,
        parent_digest=model.digest,
        training_file=body.training_file,
        validation_file=body.validation_file,
        seed=secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed,
        suffix=body.suffix,
        method=body.method_type,
        preset=Preset(body.preset or Preset.STANDARD),
        hyperparameters=hyperparameters,
        metadata=body.metadata,
        alias=body.alias,
        strict=bool(body.strict),
        evaluation=EvaluationSpec() if body.evaluation is None else body.evaluation.requested,
        gate=requested_gate(body.gate, services.jobs.gate_policies.get(tenant_id)),
    )


def _check_rank(hyperparameters: Hyperparameters, max_lora_rank: int) -> None:
    if hyperparameters.lora_r != "auto" and hyperparameters.lora_r > max_lora_rank:
        raise InvalidRequestError(
            f"lora_r {hyperparameters.lora_r} is over the limit of {max_lora_rank} of this service.",
            param="hyperparameters.lora_r",
            code="invalid_value",
        )


def _idempotency(body: JobRequest, key: str | None, retry_count: str | None) -> Idempotency:
    # no warnings: "auto" stands where the model promises a number
    sent = json.dumps(body.model_dump(mode="json", exclude_unset=True, warnings=False), sort_keys=True)
    return Idempotency(
        request_digest=hashlib.sha256(sent.encode()).hexdigest(),
        key=key,
        retry=None if retry_count is None else retry_count.strip() != "0",
    )


def _metadata_filter(request: Request) -> Mapping[str, str] | None:
    """`metadata[k]=v` pairs; `metadata=null` asks for jobs without any."""
    pairs = {}
    for name, value in request.query_params.items():
        if name.startswith("metadata["):
            if not name.endswith("]"):
                raise InvalidRequestError("Write a metadata filter as metadata[key]=value.", param=name)
            pairs[name.removeprefix("metadata[").removesuffix("]")] = value
    null = request.query_params.get("metadata")
    if null is None:
        return pairs or None
    if null != "null" or pairs:
        raise InvalidRequestError("Filter by metadata[key]=value, or by metadata=null alone.", param="metadata")
    return {}


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)
