"""The drift bench: its many streams against the monitor, its usual tests against slow ones, and a small whole run."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from adapters.drift.monitor import InputMonitor
from bench.drift import report
from bench.drift.__main__ import main
from bench.drift.peers import TESTS, kolmogorov_smirnov
from bench.drift.prompts import PromptEmbedder, Prompts
from bench.drift.streams import first_alarms, ratios, walks
from bench.drift.texts import read
from tests.adapters.drifting import reference, vectors

WORDS = ("pay", "card", "lost", "room", "late", "book", "train", "please", "where", "when", "my", "the", "is", "need")


def _texts(rng: random.Random, num: int) -> list[str]:
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) + f" {index}" for index in range(num)]


def _write_data(directory: Path, num: int) -> None:
    rng = random.Random(0)
    for task in ("banking77", "clinc150"):
        (directory / "tasks" / task).mkdir(parents=True)
        for split in ("train", "validation"):
            rows = [
                {"input": text, "meta": {"label": f"l{i % 16}", "domain": ("banking", "travel")[i % 2]}}
                for i, text in enumerate(_texts(rng, num))
            ]
            path = directory / "tasks" / task / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "drift").mkdir()
    for name in ("nlupp_banking", "nlupp_hotels", "pep_sentences_2000_2005", "pep_sentences_2020_2026"):
        (directory / "drift" / f"{name}.txt").write_text("\n".join(_texts(rng, num)))
    (directory / "drift" / "product_pros_cons.txt").write_text("\n".join(_texts(rng, num)))
    (directory / "corpora").mkdir()
    with gzip.open(directory / "corpora" / "sgd_dev.jsonl.gz", "wt") as lines:
        for _ in range(num):
            turns = [[speaker, text, []] for text in _texts(rng, 4) for speaker in "US"]
            lines.write(json.dumps({"turns": turns}) + "\n")


def _prompts(num: int, shift: float = 0.0) -> Prompts:
    rng = np.random.default_rng(7)
    return Prompts(vectors(rng, num, shift), rng.gamma(3.0, size=num), rng.gamma(4.0, size=num))


def test_many_streams_read_what_the_monitor_reads() -> None:
    made, prompts = reference(0), _prompts(200, shift=0.3)
    streams = walks(np.random.default_rng(0), np.arange(200), 2, 150)
    found = ratios(made, prompts, streams, np.random.default_rng(0))
    for row, stream in enumerate(streams):
        monitor = InputMonitor(made)
        for step, index in enumerate(stream):
            readings = monitor.observe(
                prompts.embeddings[index], {name: float(values[index]) for name, values in prompts.numbers.items()}
            )
            path = found["prompt_embedding"][row, step]
            assert readings[0].ratio == (None if np.isneginf(path) else pytest.approx(path, abs=1e-3))
    assert (first_alarms({"a": np.array([[0.5, 1.0], [0.2, 0.3]], np.float32)}) == [2, 3]).all()


def test_a_walk_meets_a_prompt_again_only_after_all_others() -> None:
    walk = walks(np.random.default_rng(0), np.arange(10, 17), 3, 20)
    for row in walk:
        assert set(row[:7]) == set(row[7:14]) == set(range(10, 17))
    assert not (walk[0] == walk[1]).all()


@pytest.mark.parametrize("name", TESTS)
def test_a_usual_test_finds_another_distribution_and_mostly_not_the_same(name: str) -> None:
    rng = np.random.default_rng(1)
    own = vectors(rng, 150)
    same, other = (np.stack([vectors(rng, 64, shift) for _ in range(40)]) for shift in (0.0, 1.5))
    assert (TESTS[name](own, other, rng) < 0.02).all()
    assert (TESTS[name](own, same, rng) < 0.05).mean() < 0.3


def test_the_distance_of_kolmogorov_and_smirnov_is_between_the_steps_of_both() -> None:
    rng = np.random.default_rng(2)
    own, window = vectors(rng, 30)[:, :1], vectors(rng, 20, 0.5)[None, :, :1]
    at = np.concatenate([own[:, 0], window[0, :, 0]])
    gap = max(abs((own[:, 0] <= x).mean() - (window[0, :, 0] <= x).mean()) for x in at)
    scale = np.sqrt(30 * 20 / 50)
    value = (scale + 0.12 + 0.11 / scale) * gap
    slow = 2 * sum((-1) ** (j - 1) * np.exp(-2 * j * j * value**2) for j in range(1, 100))
    assert kolmogorov_smirnov(own, window, rng)[0] == pytest.approx(min(slow, 1), abs=1e-6)


def test_each_text_of_a_source_is_there_once_and_typos_change_most_of_them(tmp_path: Path) -> None:
    _write_data(tmp_path, 60)
    found = read(tmp_path, 50, 20, seed=1)
    assert [len(texts) for texts in found.sources.values()] == [50, 50, 50]
    assert all(len(set(texts)) == len(texts) for texts in found.sources.values())
    typos = found.shifts[-1]
    assert sum(a != b for a, b in zip(typos.before, typos.after, strict=True)) > 30
    assert len(found.conversations) == 20 and all(len(turns) == 4 for turns in found.conversations)
    assert read(tmp_path, 50, 20, seed=1) == found


def test_a_prompt_is_embedded_as_the_service_does_it_and_found_again(tiny_llama_dir: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["where is my card", "a much longer prompt about a lost card and a late train", "pay"]
    found = PromptEmbedder(tiny_llama_dir, tmp_path, print).embed(texts)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    for index, text in enumerate(texts):
        chat = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        row = torch.tensor([tokenizer(rendered, add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            output = model(input_ids=row, labels=row, output_hidden_states=True)
        mean = output.hidden_states[-1][0].float().mean(0)
        np.testing.assert_allclose(found.embeddings[index], (mean / mean.norm()).numpy(), atol=0.01)
        assert found.length[index] == row.shape[1]
        assert found.nll[index] == pytest.approx(float(output.loss), rel=0.02)
    again = PromptEmbedder(tiny_llama_dir, tmp_path, print).embed(texts)
    np.testing.assert_array_equal(again.embeddings, found.embeddings)
    assert len(list(tmp_path.glob("*.npz"))) == 1


@pytest.mark.slow
def test_a_small_run_fills_every_table_and_the_document(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_data(tmp_path / "data", 400)
    main(
        ["--data", str(tmp_path / "data"), "--base", str(tiny_llama_dir), "--quick", "--output", str(tmp_path / "out")]
    )
    printed = capsys.readouterr().out
    for title in ("Run length without drift", "Prompts until a shift", "Conversations", "Usual tests", "Cost"):
        assert f"### {title}" in printed
    (path,) = (tmp_path / "out").glob("*.json")
    results = json.loads(path.read_text())
    assert len(results["control"]) == 3 * 2 + 1 and len(results["delays"]) == 6 * 2 and len(results["cost"]) == 4
    document = tmp_path / "page.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_document(results, document)
    assert document.read_text() == f"before\n{report.BEGIN}\n{report.markdown(results)}\n{report.END}\nafter\n"
