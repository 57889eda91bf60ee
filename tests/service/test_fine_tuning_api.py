"""/v1/fine_tuning/jobs through the official client, over a socket."""

from __future__ import annotations

from typing import Any

import httpx
import httpx2
import openai
import pytest
from openai import OpenAI

from service.job import EventLevel, EventType, JobStatus
from tests.service.http_fixtures import Served

JOBS = "/v1/fine_tuning/jobs"


def _create(served: Served, **fields: Any) -> Any:
    fields.setdefault("training_file", served.control.upload())
    return served.client().fine_tuning.jobs.create(model="tiny", **fields)


def _refused(served: Served, **fields: Any) -> tuple[str | None, str | None]:
    """The (param, code) of the 400 that answers this body."""
    body = {"model": "tiny", "training_file": "file-none", **fields}
    response = served.http().post(JOBS, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["code"]


def test_a_job_is_made_with_defaults(served: Served) -> None:
    training_file = served.control.upload()
    job = served.client().fine_tuning.jobs.create(model="tiny", training_file=training_file)
    assert (job.object, job.model, job.status) == ("fine_tuning.job", "tiny", "validating_files")
    assert job.training_file == training_file and job.validation_file is None
    assert job.organization_id == served.control.acme.id
    assert 0 <= job.seed < 2**31
    assert job.hyperparameters.n_epochs == job.hyperparameters.batch_size == "auto"
    assert job.method is not None and job.method.type == "supervised"
    assert (job.error, job.fine_tuned_model, job.finished_at, job.trained_tokens) == (None, None, None, None)
    assert job.result_files == [] and job.metadata is None and job.estimated_finish is None
    assert job.to_dict()["paused"] is False
    assert served.client().fine_tuning.jobs.retrieve(job.id) == job


def test_everything_that_can_be_asked_for_is_kept(served: Served) -> None:
    validation_file = served.control.upload()
    hyperparameters: Any = {
        "n_epochs": 4,
        "batch_size": "auto",
        "learning_rate": 2e-3,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "layers_to_transform": [0, 2],
        "schedule": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "kl_to_base": 0.5,
        "activation_checkpointing": True,
        "eval_every": 5,
        "early_stopping_patience": None,
    }
    job = _create(
        served,
        validation_file=validation_file,
        suffix="intents.v-1_0",
        seed=7,
        metadata={"team": "x"},
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        extra_body={"alias": "best", "preset": "light"},
    )
    assert (job.seed, job.metadata, job.validation_file) == (7, {"team": "x"}, validation_file)
    answered = job.to_dict()
    assert (answered["alias"], answered["suffix"], answered["preset"]) == ("best", "intents.v-1_0", "light")
    for shown in (answered["hyperparameters"], answered["method"]["supervised"]["hyperparameters"]):
        assert {name: shown[name] for name in hyperparameters} == hyperparameters
    kept = served.control.jobs.get(served.control.acme.id, job.id).spec.hyperparameters
    assert kept.target_modules == ("q_proj", "v_proj") and kept.early_stopping_patience is None
    assert kept.lora_alpha == 16 and kept.learning_rate_multiplier == "auto"


def test_a_preference_job_is_openais(served: Served) -> None:
    job = _create(served, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 2}}})
    assert job.method is not None and job.method.type == "dpo" and job.method.dpo is not None
    hyperparameters = job.method.dpo.hyperparameters
    assert hyperparameters is not None and (hyperparameters.beta, hyperparameters.n_epochs) == (0.2, 2)
    assert job.to_dict()["preset"] == "standard"
    spec = served.control.jobs.get(served.control.acme.id, job.id).spec
    assert (spec.method, spec.hyperparameters.beta) == ("dpo", 0.2)
    assert _create(served, method={"type": "dpo"}).method.dpo.hyperparameters.beta == "auto"


def test_why_dora_is_refused_is_said(shared_service: Served) -> None:
    body = {"model": "tiny", "training_file": "file-none", "hyperparameters": {"use_dora": True}}
    message = shared_service.http().post(JOBS, json=body).json()["error"]["message"]
    assert "norm of W + B A" in message and "use_rslora" in message


def test_a_learning_rate_may_be_probed(served: Served) -> None:
    job = _create(served, extra_body={"hyperparameters": {"learning_rate": "probe", "learning_rate_multiplier": 2}})
    assert job.to_dict()["hyperparameters"]["learning_rate"] == "probe"


def test_the_deprecated_place_of_hyperparameters_still_works(served: Served) -> None:
    job = _create(served, hyperparameters={"n_epochs": 2, "learning_rate_multiplier": 0.5, "batch_size": 4})
    assert (job.hyperparameters.n_epochs, job.hyperparameters.learning_rate_multiplier) == (2, 0.5)
    assert job.method.supervised.hyperparameters.batch_size == 4


def test_null_and_auto_ask_for_the_default(served: Served) -> None:
    job = _create(
        served,
        suffix=None,
        seed=None,
        validation_file=None,
        metadata=None,
        integrations=None,
        extra_body={"hyperparameters": {"n_epochs": None, "lora_r": "auto", "target_modules": "all-linear"}},
    )
    assert job.hyperparameters.n_epochs == "auto"
    assert job.to_dict()["hyperparameters"]["target_modules"] == "all-linear"
    assert job.to_dict()["hyperparameters"]["early_stopping_patience"] == "auto"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"colour": "green"}, "colour"),
        ({"hyperparameters": {"colour": 1}}, "hyperparameters.colour"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"colour": 1}}}},
            "method.supervised.hyperparameters.colour",
        ),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "method.dpo.hyperparameters.beta"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"kl_to_base": 0.1}}}},
         "method.dpo.hyperparameters.kl_to_base"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 0.1}}}},
         "method.supervised.hyperparameters.beta"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
        ({"method": {"type": "dpo"}, "hyperparameters": {"n_epochs": 1}}, "hyperparameters"),
        ({"preset": "heavy"}, "preset"),
        ({"hyperparameters": {"use_dora": True}}, "hyperparameters.use_dora"),
        ({"hyperparameters": {"layers_to_transform": []}}, "hyperparameters.layers_to_transform"),
        ({"hyperparameters": {"layers_to_transform": [0, 0]}}, "hyperparameters.layers_to_transform"),
        ({"hyperparameters": {"layers_to_transform": [-1]}}, "hyperparameters.layers_to_transform[0]"),
        ({"hyperparameters": {"schedule": "step"}}, "hyperparameters.schedule"),
        ({"hyperparameters": {"warmup_ratio": 0.9}}, "hyperparameters.warmup_ratio"),
        ({"hyperparameters": {"weight_decay": -1}}, "hyperparameters.weight_decay"),
        ({"hyperparameters": {"kl_to_base": -1}}, "hyperparameters.kl_to_base"),
        ({"hyperparameters": {"activation_checkpointing": 1}}, "hyperparameters.activation_checkpointing"),
        ({"hyperparameters": {"learning_rate": "fast"}}, "hyperparameters.learning_rate"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"method": {}}, "method.type"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "3"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 2.5}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"learning_rate": -1}}, "hyperparameters.learning_rate"),
        (
            {"hyperparameters": {"learning_rate": 0.1, "learning_rate_multiplier": 2}},
            "hyperparameters.learning_rate_multiplier",
        ),
        ({"hyperparameters": {"lora_r": 0}}, "hyperparameters.lora_r"),
        ({"hyperparameters": {"lora_r": 1000}}, "hyperparameters.lora_r"),
        ({"hyperparameters": {"lora_dropout": 1}}, "hyperparameters.lora_dropout"),
        ({"hyperparameters": {"target_modules": []}}, "hyperparameters.target_modules"),
        ({"hyperparameters": {"target_modules": "q_proj"}}, "hyperparameters.target_modules"),
        ({"hyperparameters": {"eval_every": 0}}, "hyperparameters.eval_every"),
        ({"hyperparameters": {}, "method": {"type": "supervised", "supervised": {"hyperparameters": {}}}},
         "hyperparameters"),
        ({"suffix": ""}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"suffix": "a:b"}, "suffix"),
        ({"suffix": "a,b"}, "suffix"),
        ({"suffix": "a\n"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"metadata": {f"k{number}": "v" for number in range(17)}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"training_file": None}, "training_file"),
        ({"training_file": "file-none"}, "training_file"),
        ({"alias": "a b"}, "alias"),
        ({"evaluation": {"colour": 1}}, "evaluation.colour"),
        ({"evaluation": {"max_examples": 0}}, "evaluation.max_examples"),
        ({"evaluation": {"max_examples": 2001}}, "evaluation.max_examples"),
        ({"evaluation": {"max_seconds": 0}}, "evaluation.max_seconds"),
        ({"evaluation": {"num_shots": 33}}, "evaluation.num_shots"),
        ({"evaluation": {"task": "poetry"}}, "evaluation.task"),
        ({"evaluation": {"assertions": {"contains": "x"}}}, "evaluation.assertions"),
        ({"evaluation": {"assertions": [{"contains": "x"}, {"regex": "("}]}}, "evaluation.assertions[1].regex"),
        ({"evaluation": {"assertions": [{"json_schema": {"type": 1}}]}}, "evaluation.assertions[0].json_schema"),
        ({"gate": "on"}, "gate"),
        ({"gate": {"min_gain": 0}}, "gate.min_gain"),
        ({"gate": {"max_p": 0}}, "gate.max_p"),
        ({"gate": {"min_gain_over_base": 2}}, "gate.min_gain_over_base"),
        ({"gate": {"few_examples": "maybe"}}, "gate.few_examples"),
        ({"model": 7}, "model"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_a_400_that_names_it(shared_service: Served, fields: dict[str, Any], param: str) -> None:
    assert _refused(shared_service, **fields)[0] == param


def test_a_metadata_key_that_is_too_long_is_refused(shared_service: Served) -> None:
    param, _ = _refused(shared_service, metadata={"k" * 65: "v"})
    assert param is not None and param.startswith("metadata")


def test_a_missing_field_is_named(shared_service: Served) -> None:
    response = shared_service.http().post(JOBS, json={"model": "tiny"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "training_file")
    assert error["code"] == "missing_required_parameter"


def test_an_unknown_model_is_a_404(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        served.client().fine_tuning.jobs.create(model="gpt-5", training_file=served.control.upload())
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_training_may_go_on_from_a_fine_tuned_model_or_alias(served: Served) -> None:
    model = served.control.publish(alias="best")
    for name in (model, "best"):
        job = served.client().fine_tuning.jobs.create(model=name, training_file=served.control.upload())
        assert job.model == model
        spec = served.control.jobs.get(served.control.acme.id, job.id).spec
        assert (spec.base_model, spec.parent_digest) == ("tiny", "d" * 64)


def test_a_training_file_of_another_tenant_or_purpose_is_a_400(served: Served) -> None:
    foreign = served.control.upload(served.control.zenith)
    with pytest.raises(openai.BadRequestError) as caught:
        _create(served, training_file=foreign)
    assert (caught.value.param, caught.value.code) == ("training_file", "invalid_training_file")


def test_a_create_whose_answer_was_lost_is_not_made_twice(served: Served) -> None:
    """Trap 17: the client sends the same body again, without any idempotency header."""
    sent: list[httpx2.Request] = []

    class LosesFirstAnswer(httpx2.HTTPTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            response = super().handle_request(request)
            sent.append(request)
            if len(sent) == 1:
                response.read()
                response.close()
                raise httpx2.ReadError("connection reset")
            return response

    with httpx2.Client(transport=LosesFirstAnswer()) as transport:
        client = OpenAI(
            base_url=f"{served.url}/v1", api_key=served.control.acme_key, http_client=transport, max_retries=2
        )
        job = client.fine_tuning.jobs.create(model="tiny", training_file=served.control.upload())
    assert len(sent) == 2 and "idempotency-key" not in sent[1].headers
    assert [made.id for made in served.client().fine_tuning.jobs.list()] == [job.id]


def test_two_creates_on_purpose_are_two_jobs(served: Served) -> None:
    training_file = served.control.upload()
    assert _create(served, training_file=training_file).id != _create(served, training_file=training_file).id


def test_an_idempotency_key_makes_one_job(served: Served) -> None:
    training_file = served.control.upload()
    headers = {"idempotency-key": "abc"}
    first = _create(served, training_file=training_file, extra_headers=headers)
    assert _create(served, training_file=training_file, extra_headers=headers).id == first.id
    with pytest.raises(openai.BadRequestError) as caught:
        _create(served, training_file=training_file, seed=5, extra_headers=headers)
    assert caught.value.code == "idempotency_key_reused"


def test_a_plain_http_client_that_repeats_itself_at_once_makes_one_job(served: Served) -> None:
    body = {"model": "tiny", "training_file": served.control.upload()}
    answers = [served.http().post(JOBS, json=body).json()["id"] for _ in range(2)]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_jobs_are_listed_in_pages_and_by_metadata(served: Served) -> None:
    made = [_create(served, metadata={"team": team} if team else None).id for team in ("a", "b", "", "a", "a")]
    jobs = served.client().fine_tuning.jobs
    assert [job.id for job in jobs.list(limit=2)] == made[::-1]
    assert [job.id for job in jobs.list(metadata={"team": "a"}, limit=2)] == [made[4], made[3], made[0]]
    assert [job.id for job in jobs.list(extra_query={"metadata": "null"})] == [made[2]]
    http = served.http()
    for params in ({"metadata": "x"}, {"metadata[k": "x"}, {"limit": "101"}, {"colour": "x"}, {"after": "ftjob-none"}):
        response = http.get(JOBS, params=params)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == next(iter(params))
    assert http.get(f"{JOBS}?metadata[a]=1&metadata[a]=2").status_code == 400


def test_a_job_is_paused_resumed_and_cancelled(served: Served) -> None:
    jobs = served.client().fine_tuning.jobs
    job = _create(served)
    paused = jobs.pause(job.id)
    assert paused.status == "queued" and paused.to_dict()["paused"] is True
    assert jobs.resume(job.id).to_dict()["paused"] is False
    cancelled = jobs.cancel(job.id)
    assert cancelled.status == "cancelled" and cancelled.finished_at is not None
    assert jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError) as caught:
        jobs.pause(job.id)
    assert caught.value.code == "invalid_job_state"


def test_a_job_that_ran_shows_its_events_checkpoints_and_results(served: Served) -> None:
    control = served.control
    job_id = _create(served, suffix="s", hyperparameters={"n_epochs": "auto"}).id
    claim = control.claim()
    control.queue.files_validated(claim)
    control.queue.progress(claim, resolved={"n_epochs": 3}, estimated_finish=2e9, trained_tokens=5)
    jobs = served.client().fine_tuning.jobs
    running = jobs.retrieve(job_id)
    assert (running.status, running.estimated_finish, running.hyperparameters.n_epochs) == ("running", 2_000_000_000, 3)
    metrics = {"step": 1, "total_steps": 2, "train_loss": 1.5, "train_mean_token_accuracy": 0.5}
    control.queue.event(claim, "Step 1/2: training loss=1.50", type=EventType.METRICS, data=metrics)
    control.queue.event(claim, "Two rows repeat", level=EventLevel.WARN)
    control.queue.checkpoint(
        claim,
        step=1,
        digest="c" * 64,
        base_fingerprint="fingerprint-of-tiny",
        metrics={"train_loss": 1.5, "full_valid_loss": None, "private": 1.0},
    )
    model = control.finish(claim)
    done = jobs.retrieve(job_id)
    assert (done.status, done.fine_tuned_model, done.trained_tokens) == ("succeeded", model, 10)
    assert done.estimated_finish is None

    events = list(jobs.list_events(job_id, limit=2))
    assert events[0].message == "The job has successfully completed"
    assert [event.level for event in events if event.message == "Two rows repeat"] == ["warn"]
    (step,) = [event for event in events if event.type == "metrics"]
    assert step.data == metrics and step.object == "fine_tuning.job.event"
    assert events[-1].message == f"Created fine-tuning job: {job_id}"

    (checkpoint,) = jobs.checkpoints.list(job_id)
    assert checkpoint.fine_tuned_model_checkpoint == f"{model}:ckpt-step-1"
    assert (checkpoint.step_number, checkpoint.fine_tuning_job_id) == (1, job_id)
    assert (checkpoint.metrics.step, checkpoint.metrics.train_loss) == (1, 1.5)
    assert "private" not in checkpoint.metrics.to_dict()


def test_a_failed_job_says_why(served: Served) -> None:
    job_id = _create(served).id
    control = served.control
    control.queue.fail(control.claim(), code="invalid_n_examples", message="3 examples", param="training_file")
    job = served.client().fine_tuning.jobs.retrieve(job_id)
    assert job.status == "failed" and job.error is not None
    assert (job.error.code, job.error.message, job.error.param) == ("invalid_n_examples", "3 examples", "training_file")


def test_another_tenants_job_is_a_404(served: Served) -> None:
    job_id = _create(served).id
    jobs = served.client(served.control.zenith_key).fine_tuning.jobs
    for action in (
        jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list
    ):  # fmt: skip
        with pytest.raises(openai.NotFoundError) as caught:
            action(job_id)
        assert caught.value.code == "job_not_found"
    assert list(jobs.list()) == []
    assert served.control.jobs.get(served.control.acme.id, job_id).state is JobStatus.QUEUED


def test_without_a_key_nothing_is_made(served: Served) -> None:
    response = httpx.post(f"{served.url}{JOBS}", json={"model": "tiny", "training_file": "x"})
    assert response.status_code == 401


def test_an_evaluation_is_asked_for_and_shown(served: Served) -> None:
    asked: Any = {
        "file": served.control.upload(),
        "max_examples": 50,
        "num_shots": 0,
        "task": "json",
        "assertions": [{"json_schema": {"type": "object"}}, {"max_length": 90}],
    }
    job = _create(served, extra_body={"evaluation": asked})
    assert job.to_dict()["evaluation"] == {**asked, "max_seconds": 180.0}
    kept = served.control.jobs.get(served.control.acme.id, job.id).spec.evaluation
    assert [assertion.holds("[]") for assertion in kept.assertions] == [False, True]


def test_an_evaluation_file_of_another_tenant_is_a_400_and_one_in_use_stays(served: Served) -> None:
    strange = served.control.upload(served.control.zenith)
    file = served.control.upload()
    refused = _refused(served, training_file=file, evaluation={"file": strange})
    assert refused == ("evaluation.file", "invalid_evaluation_file")
    _create(served, extra_body={"evaluation": {"file": file}})
    with pytest.raises(openai.BadRequestError, match="is used by the fine-tuning job"):
        served.client().files.delete(file)


def test_an_evaluation_is_there_when_the_job_has_succeeded(served: Served) -> None:
    job_id = _create(served).id
    http = served.http()
    missing = http.get(f"{JOBS}/{job_id}/evaluation")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "evaluation_not_found")
    claim = served.control.claim()
    model = served.control.queue.succeed(
        claim,
        digest="d" * 64,
        base_fingerprint="fingerprint-of-tiny",
        metrics={"evaluation": {"task": "labels"}},
        trained_tokens=1,
    )
    found = http.get(f"{JOBS}/{job_id}/evaluation").json()
    assert found == {"object": "fine_tuning.job.evaluation", "job": job_id, "model": model, "task": "labels"}
    strange = served.http(served.control.zenith_key).get(f"{JOBS}/{job_id}/evaluation")
    assert strange.status_code == 404
