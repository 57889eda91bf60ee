"""`python -m bench.drift --data DIR`: measure on one core, print the tables, write bench/results/drift/."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

NUM_PEER_SHIFTS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here comes from a hub
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from bench.drift import report

    if options.write_docs:
        report.write_document(_newest())
        return
    if options.data is None:
        raise SystemExit("--data DIR says where the texts are (bench/drift/texts.py says what has to be there)")
    results = _measure(options)
    print(report.markdown(results))
    directory = options.output or (None if options.quick else _directory())
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{results['date']}-{results['machine']['kind']}.json"
        path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    from datetime import UTC, datetime

    from bench.drift.cost import cost
    from bench.drift.delays import delays, peers
    from bench.drift.plan import Plan
    from bench.drift.prompts import PromptEmbedder
    from bench.drift.run_lengths import control, conversations
    from bench.drift.texts import read
    from bench.results import machine
    from service.config import BUNDLED_BASE

    plan = Plan.quick() if options.quick else Plan()
    started = time.monotonic()

    def note(what: str) -> None:
        print(f"{time.monotonic() - started:4.0f} s  {what}", flush=True)

    texts = read(options.data, plan.pool, plan.conversations, plan.seed)
    embedder = PromptEmbedder(options.base or Path(BUNDLED_BASE), options.cache, note)
    found: dict[str, Any] = {}
    for name, measured in (
        ("control", lambda: control(plan, texts.sources, embedder)),
        ("delays", lambda: delays(plan, texts.shifts, embedder)),
        ("conversations", lambda: conversations(plan, texts.conversations, embedder)),
        ("peers", lambda: peers(plan, texts.shifts[:NUM_PEER_SHIFTS], embedder)),
        ("cost", lambda: cost(plan)),
    ):
        found[name] = measured()
        note(name)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "quick": options.quick,
        "seconds": time.monotonic() - started,
        "machine": machine(),
        "plan": asdict(plan),
        **found,
    }


def _directory() -> Path:
    """Beside the speed results, whose newest file is found by name."""
    from bench.results import DIRECTORY

    return DIRECTORY / "drift"


def _newest() -> dict[str, Any]:
    paths = sorted(_directory().glob("*.json"), key=lambda path: path.name)
    if not paths:
        raise SystemExit("bench/results/drift/ is empty: run `python -m bench.drift --data DIR` first")
    found: dict[str, Any] = json.loads(paths[-1].read_text())
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.drift", description="Run lengths and delays of drift tests.")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with tasks/, drift/ and corpora/")
    parser.add_argument("--base", type=Path, metavar="DIR", help="another base than the bundled one")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep embeddings there for the next run")
    parser.add_argument("--quick", action="store_true", help="small sizes, only to see that it runs")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the results there")
    parser.add_argument("--write-docs", action="store_true", help="write the newest results into docs/benchmarks.md")
    return parser


if __name__ == "__main__":
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # before numpy is imported: one core, whatever the machine has
    main()
