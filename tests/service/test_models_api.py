"""/v1/models and /v1/adapters over a socket."""

from __future__ import annotations

import openai
import pytest

from tests.service.http_fixtures import Served


def test_the_official_client_lists_and_gets_base_and_fine_tuned_models(served: Served) -> None:
    model = served.control.publish(suffix="intents")
    models = served.client().models
    assert [entry.id for entry in models.list()] == ["tiny", model]
    base, mine = models.retrieve("tiny"), models.retrieve(model)
    assert (base.object, base.owned_by) == ("model", "rootstock")
    assert (mine.id, mine.owned_by) == (model, "acme") and mine.created > 0


def test_an_alias_gets_the_model_it_points_at(served: Served) -> None:
    model = served.control.publish(alias="best")
    assert served.client().models.retrieve("best").id == model


def test_a_model_id_with_a_slash_is_found(served: Served) -> None:
    model = served.control.publish(base_model="org/tiny", model="org/tiny", suffix="a")
    assert model.startswith("ft:org/tiny:acme:a:")
    assert served.client().models.retrieve(model).id == model  # the client sends %2F
    assert served.http().get(f"/v1/models/{model}").json()["id"] == model
    assert served.client().models.delete(model).deleted


def test_a_deleted_model_is_gone_and_its_adapter_retired(served: Served) -> None:
    model = served.control.publish()
    answer = served.client().models.delete(model)
    assert (answer.id, answer.object, answer.deleted) == (model, "model", True)
    assert served.engine.retired == ["d" * 64]
    with pytest.raises(openai.NotFoundError) as caught:
        served.client().models.retrieve(model)
    assert caught.value.code == "model_not_found"


def test_an_adapter_that_another_model_still_uses_is_not_retired(served: Served) -> None:
    model = served.control.publish()
    served.control.publish(served.control.zenith)
    assert served.client().models.delete(model).deleted
    assert served.engine.retired == []


def test_a_model_in_use_and_the_base_are_a_400(served: Served) -> None:
    model = served.control.publish(alias="best")
    with pytest.raises(openai.BadRequestError, match="best") as caught:
        served.client().models.delete(model)
    assert caught.value.code == "model_in_use"
    with pytest.raises(openai.BadRequestError):
        served.client().models.delete("tiny")


def test_another_tenants_model_is_a_404(served: Served) -> None:
    model = served.control.publish(alias="best")
    other = served.client(served.control.zenith_key)
    for name in (model, "best"):
        with pytest.raises(openai.NotFoundError):
            other.models.retrieve(name)
        with pytest.raises(openai.NotFoundError):
            other.models.delete(name)
        assert served.http(served.control.zenith_key).get(f"/v1/adapters/{name}").status_code == 404
    assert [entry.id for entry in other.models.list()] == ["tiny"]
    assert served.http(served.control.zenith_key).get("/v1/adapters").json()["data"] == []


@pytest.mark.slow
def test_adapters_show_digest_job_metrics_and_aliases(served: Served) -> None:
    first = served.control.publish(digest="a" * 64)
    model = served.control.publish(alias="best", digest="b" * 64)
    page = served.http().get("/v1/adapters").json()
    assert [entry["id"] for entry in page["data"]] == [model, first]
    assert (page["object"], page["has_more"], page["last_id"]) == ("list", False, first)
    shown = served.http().get("/v1/adapters/best").json()
    assert shown == page["data"][0]
    assert (shown["digest"], shown["aliases"], shown["metrics"]) == ("b" * 64, ["best"], {"valid_loss": 0.5})
    assert served.http().get(f"/v1/fine_tuning/jobs/{shown['job']}").json()["fine_tuned_model"] == model
    assert page["data"][1]["aliases"] == []


def test_a_checkpoint_is_shown_and_chats_under_its_own_id(served: Served) -> None:
    control = served.control
    control.create_job()
    claim = control.claim()
    control.queue.checkpoint(claim, step=3, digest="c" * 64, base_fingerprint="fingerprint-of-tiny", metrics={})
    checkpoint = f"{claim.job.model_id}:ckpt-step-3"
    shown = served.http().get(f"/v1/adapters/{checkpoint}").json()
    assert (shown["step"], shown["digest"]) == (3, "c" * 64)
    answer = served.client().chat.completions.create(model=checkpoint, messages=[{"role": "user", "content": "Hi"}])
    assert answer.model == checkpoint
    assert [request.adapter for request in served.engine.requests] == ["c" * 64]
