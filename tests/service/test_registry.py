"""Models, versions and aliases, on SQLite and Postgres."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.errors import BaseMismatchError
from service.aliases import MoveKind
from service.database import connect
from service.errors import ConflictError, InvalidRequestError, NotFoundError
from service.registry import BaseIdentity, Registry
from service.routing import ResolvedModel
from tests.service.control_fixtures import BASE, Control, make_control


def _pointer(control: Control, name: str = "best") -> str:
    return control.registry.resolve(control.acme.id, name).id


def test_base_version_and_alias_resolve_to_what_serves(control: Control) -> None:
    model = control.publish(suffix="intents", alias="best")
    assert control.registry.resolve(control.acme.id, "tiny") == ResolvedModel("tiny", None)
    assert control.registry.resolve(control.acme.id, "tiny").is_base
    for name in (model, "best"):
        assert control.registry.resolve(control.acme.id, name) == ResolvedModel(model, "d" * 64)


def test_another_tenants_models_and_aliases_are_not_there(control: Control) -> None:
    model = control.publish(alias="best")
    for name in (model, "best", "", "ft:tiny:acme::none", "nobody"):
        for action in (control.registry.resolve, control.registry.version, control.registry.delete_model):
            with pytest.raises(NotFoundError) as caught:
                action(control.zenith.id, name)
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(NotFoundError):
        control.registry.aliases.set(control.zenith.id, "mine", model)
    for alias_action in (
        control.registry.aliases.get, control.registry.aliases.delete, control.registry.aliases.roll_back
    ):  # fmt: skip
        with pytest.raises(NotFoundError):
            alias_action(control.zenith.id, "best")
    assert control.registry.versions(control.zenith.id) == []
    assert control.registry.aliases.list(control.zenith.id) == []


def test_two_tenants_may_use_the_same_alias(control: Control) -> None:
    mine, theirs = control.publish(alias="best"), control.publish(control.zenith, alias="best")
    assert control.registry.resolve(control.acme.id, "best").id == mine
    assert control.registry.resolve(control.zenith.id, "best").id == theirs


def test_an_adapter_of_other_base_weights_is_refused_on_use(control: Control) -> None:
    model = control.publish(alias="best")
    other = Registry(control.database, BaseIdentity("tiny", "other-weights"))
    for name in (model, "best"):
        with pytest.raises(BaseMismatchError, match="other weights") as caught:
            other.resolve(control.acme.id, name)
        assert caught.value.param == "model"
    assert other.version(control.acme.id, model).base_fingerprint == BASE.fingerprint


def test_versions_are_listed_newest_first_without_checkpoints(control: Control) -> None:
    first = control.publish()
    control.create_job()
    claim = control.claim()
    control.queue.checkpoint(claim, step=1, digest="c" * 64, base_fingerprint=BASE.fingerprint, metrics={})
    second = control.finish(claim, "e" * 64)
    assert [version.id for version in control.registry.versions(control.acme.id)] == [second, first]
    assert control.registry.version(control.acme.id, f"{second}:ckpt-step-1").step == 1


def test_an_alias_moves_and_rolls_back_as_far_as_its_history_goes(control: Control) -> None:
    models = [control.publish(digest=letter * 64) for letter in "abc"]
    for model in models:
        alias = control.registry.aliases.set(control.acme.id, "best", model)
        assert (alias.model, _pointer(control)) == (model, model)
    assert control.registry.aliases.roll_back(control.acme.id, "best").model == models[1]
    alias = control.registry.aliases.roll_back(control.acme.id, "best")
    assert (alias.model, alias.digest, _pointer(control)) == (models[0], "a" * 64, models[0])
    with pytest.raises(ConflictError) as caught:
        control.registry.aliases.roll_back(control.acme.id, "best")
    assert caught.value.code == "nothing_to_roll_back"
    assert [(move.model, move.kind) for move in alias.history] == [
        (models[0], MoveKind.ROLLBACK),
        (models[1], MoveKind.ROLLBACK),
        (models[2], MoveKind.SET),
        (models[1], MoveKind.SET),
        (models[0], MoveKind.SET),
    ]


def test_after_a_rollback_a_new_model_rolls_back_to_where_the_alias_was(control: Control) -> None:
    old, bad, good = (control.publish(digest=letter * 64) for letter in "abc")
    for model in (old, bad):
        control.registry.aliases.set(control.acme.id, "best", model)
    control.registry.aliases.roll_back(control.acme.id, "best")
    control.registry.aliases.set(control.acme.id, "best", good)
    assert control.registry.aliases.roll_back(control.acme.id, "best").model == old


def test_setting_an_alias_to_what_it_points_at_is_no_move(control: Control) -> None:
    model = control.publish()
    first = control.registry.aliases.set(control.acme.id, "best", model)
    assert control.registry.aliases.set(control.acme.id, "best", model) == first


def test_a_job_that_names_an_alias_moves_it_and_rollback_undoes_that(control: Control) -> None:
    first = control.publish(alias="best", digest="a" * 64)
    second = control.publish(alias="best", digest="b" * 64)
    assert _pointer(control) == second
    alias = control.registry.aliases.roll_back(control.acme.id, "best")
    assert (alias.model, [move.kind for move in alias.history]) == (
        first,
        [MoveKind.ROLLBACK, MoveKind.PUBLISHED, MoveKind.PUBLISHED],
    )


def test_rollback_skips_models_deleted_since(control: Control) -> None:
    models = [control.publish(digest=letter * 64) for letter in "abc"]
    for model in models:
        control.registry.aliases.set(control.acme.id, "best", model)
    control.registry.delete_model(control.acme.id, models[1])
    assert control.registry.aliases.roll_back(control.acme.id, "best").model == models[0]


def test_an_alias_needs_a_plain_name_and_a_model_of_its_own(control: Control) -> None:
    model = control.publish()
    for name in ("", "a,b", "a b", "ft:x", "x" * 65, "-x", "tiny", "a/b"):
        with pytest.raises(InvalidRequestError) as caught:
            control.registry.aliases.set(control.acme.id, name, model)
        assert caught.value.param == "alias"
    for target in ("tiny", "best", "ft:tiny:acme::none"):
        with pytest.raises(NotFoundError):
            control.registry.aliases.set(control.acme.id, "best", target)
    assert control.registry.aliases.list(control.acme.id) == []


def test_a_deleted_alias_is_gone_and_starts_anew(control: Control) -> None:
    first, second = control.publish(digest="a" * 64), control.publish(digest="b" * 64)
    control.registry.aliases.set(control.acme.id, "best", first)
    control.registry.aliases.delete(control.acme.id, "best")
    with pytest.raises(NotFoundError):
        control.registry.resolve(control.acme.id, "best")
    alias = control.registry.aliases.set(control.acme.id, "best", second)
    assert len(alias.history) == 1
    assert control.registry.version(control.acme.id, first).id == first


def test_a_model_in_use_cannot_be_deleted(control: Control) -> None:
    model = control.publish(alias="best")
    with pytest.raises(ConflictError, match="best"):
        control.registry.delete_model(control.acme.id, model)
    control.registry.aliases.delete(control.acme.id, "best")
    job = control.create_job(model=model, parent_digest="d" * 64)
    with pytest.raises(ConflictError, match=job.id):
        control.registry.delete_model(control.acme.id, model)
    control.jobs.cancel(control.acme.id, job.id)
    assert control.registry.delete_model(control.acme.id, model) == "d" * 64
    with pytest.raises(NotFoundError):
        control.registry.resolve(control.acme.id, model)


def test_a_digest_is_given_up_only_when_its_last_model_goes(control: Control) -> None:
    mine, theirs = control.publish(digest="a" * 64), control.publish(control.zenith, digest="a" * 64)
    assert control.registry.delete_model(control.acme.id, mine) is None
    assert control.registry.delete_model(control.zenith.id, theirs) == "a" * 64


def test_the_base_cannot_be_deleted(control: Control) -> None:
    with pytest.raises(InvalidRequestError):
        control.registry.delete_model(control.acme.id, "tiny")


def test_a_checkpoint_may_be_aliased_and_deleted_apart_from_its_model(control: Control) -> None:
    control.create_job()
    claim = control.claim()
    control.queue.checkpoint(claim, step=1, digest="c" * 64, base_fingerprint=BASE.fingerprint, metrics={})
    model = control.finish(claim)
    checkpoint = f"{model}:ckpt-step-1"
    control.registry.aliases.set(control.acme.id, "early", checkpoint)
    assert control.registry.resolve(control.acme.id, "early") == ResolvedModel(checkpoint, "c" * 64)
    control.registry.aliases.delete(control.acme.id, "early")
    assert control.registry.delete_model(control.acme.id, checkpoint) == "c" * 64
    assert control.registry.resolve(control.acme.id, model).digest == "d" * 64


def test_moves_that_race_leave_one_pointer_and_an_unbroken_history(control: Control) -> None:
    models = [control.publish(digest=letter * 64) for letter in "abcd"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda model: control.registry.aliases.set(control.acme.id, "best", model), models))
    alias = control.registry.aliases.get(control.acme.id, "best")
    assert {move.model for move in alias.history} == set(models) and alias.history[0].model == alias.model
    seen = [alias.model] + [control.registry.aliases.roll_back(control.acme.id, "best").model for _ in range(3)]
    assert sorted(seen) == sorted(models)


def test_pointers_survive_a_restart(control: Control) -> None:
    model = control.publish(alias="best")
    again = connect(control.url)
    assert Registry(again, BASE).resolve(control.acme.id, "best") == ResolvedModel(model, "d" * 64)
    again.close()


def test_a_model_is_found_by_an_index_however_many_are_registered(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'rootstock.db'}"
    database = connect(url)
    control = make_control(database, url, tmp_path)
    model = control.publish()
    control.registry.aliases.set(control.acme.id, "best", model)
    asked: list[str] = []

    @sa.event.listens_for(sa.engine.Engine, "before_cursor_execute")
    def remember(connection: object, cursor: object, statement: str, parameters: object, *rest: object) -> None:
        asked.append(statement)

    try:
        for name in (model, "best"):
            assert control.registry.resolve(control.acme.id, name).digest
    finally:
        sa.event.remove(sa.engine.Engine, "before_cursor_execute", remember)
    queries = [statement for statement in asked if statement.startswith("SELECT")]
    assert len(queries) == 2, "one query, whatever is asked for"
    with database.read() as connection:
        for query in queries:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", ("x",) * query.count("?")).all()
            assert not [step for step in plan if "SCAN" in step[3]], query
    database.close()
