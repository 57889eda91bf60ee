"""The committed example sets against the script that makes them, and against what the demo claims of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.example_set import SPLITS, ExampleSet, Row
from examples.make_examples import DIRECTORY, example_sets, write_examples

TENANTS = [example_set.tenant for example_set in example_sets()]


def rows(tenant: str, split: str) -> list[dict[str, Any]]:
    lines = (DIRECTORY / tenant / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def questions(tenant: str, split: str) -> set[str]:
    return {row["messages"][1]["content"] for row in rows(tenant, split)}


def test_the_committed_files_are_what_the_script_writes(tmp_path: Path) -> None:
    for path in write_examples(tmp_path):
        assert path.read_bytes() == (DIRECTORY / path.relative_to(tmp_path)).read_bytes()


@pytest.mark.parametrize("tenant", TENANTS)
def test_every_row_is_a_chat_of_system_user_and_assistant(tenant: str) -> None:
    for split, size in SPLITS.items():
        found = rows(tenant, split)
        assert len(found) == size
        assert all([m["role"] for m in row["messages"]] == ["system", "user", "assistant"] for row in found)
        assert all(m["content"].strip() for row in found for m in row["messages"])


@pytest.mark.parametrize("tenant", TENANTS)
def test_no_question_stands_in_two_splits_or_twice_in_one(tenant: str) -> None:
    train, validation, heldout = (questions(tenant, split) for split in SPLITS)
    assert not train & validation and not train & heldout and not validation & heldout
    assert (len(train), len(validation), len(heldout)) == tuple(SPLITS.values())


def test_a_held_out_pairing_of_template_and_words_never_meets_in_training() -> None:
    for example_set in example_sets():
        pairing_of = {row.question: row.pairing for row in example_set.rows}
        train = {pairing_of[question] for question in questions(example_set.tenant, "train")}
        heldout = {pairing_of[question] for question in questions(example_set.tenant, "heldout")}
        assert heldout and not train & heldout


@pytest.mark.parametrize("tenant", ["harbour-bank", "lantern-hotels"])
def test_every_answer_word_of_a_held_out_row_occurs_in_training(tenant: str) -> None:
    seen, asked = (
        {word for row in rows(tenant, split) for word in row["messages"][2]["content"].split()}
        for split in ("train", "heldout")
    )
    assert asked <= seen


def test_every_order_is_json_with_the_same_five_fields() -> None:
    for split in SPLITS:
        for row in rows("copper-kettle", split):
            order = json.loads(row["messages"][2]["content"])
            assert list(order) == ["item", "count", "size", "milk", "to_go"]


def test_too_few_templates_are_an_error_that_says_how_many_rows_they_make() -> None:
    example_set = ExampleSet("small", "Answer.", (Row("a", "What?", "That."),))
    with pytest.raises(ValueError, match=r"make [01] rows where 240 are wanted"):
        example_set.files()
