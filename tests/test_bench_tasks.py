"""`python -m bench.tasks` on a task of a few lines: the whole way through the API."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.tasks import as_example, main, read_rows


def _write_task(directory: Path, num_train: int, num_held_out: int) -> None:
    directory.mkdir(parents=True)
    for split, count in (("train", num_train), ("validation", num_held_out)):
        rows = [{"input": f"word {i}?", "output": "a medlar", "meta": {"shop": "ab"[i % 2]}} for i in range(count)]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_row_becomes_a_chat_that_can_be_sliced() -> None:
    example = as_example({"input": "a?", "output": "b", "meta": {"label": "b", "n": 3, "empty": ""}})
    assert [message["content"] for message in example["messages"]] == ["a?", "b"]
    assert example["metadata"] == {"label": "b"}


def test_rows_are_chosen_by_their_meta(tmp_path: Path) -> None:
    _write_task(tmp_path / "fruit", 6, 2)
    assert len(read_rows(tmp_path / "fruit" / "train.jsonl", {"shop": "a"})) == 3


@pytest.mark.slow
def test_a_task_is_fine_tuned_and_shown_as_a_table(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_task(tmp_path / "fruit", 24, 20)
    sizes = ["--examples", "20", "--held-out", "12", "--shots", "2", "--epochs", "3", "--learning-rate", "0.005"]
    main(["--data", str(tmp_path), "--task", "fruit", *sizes, "--base", str(tiny_llama_dir)])
    printed = capsys.readouterr().out
    head, _, accuracy, *_ = printed.splitlines()
    assert head == "| fruit (labels) | base | few-shot | adapter | p against few-shot |"
    assert accuracy.startswith("| **accuracy** | 0.000 [0.000, 0.242] |")
    assert "12 held-out examples, 2 shots, seed 1" in printed
