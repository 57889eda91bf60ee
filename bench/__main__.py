"""`python -m bench`: measure, show the table, write bench/results/. See docs/benchmarks.md.

A whole run leaves its file there; a quick or partial one leaves a file only where --output says.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

NAMES = ("decode", "peers", "http", "prefix", "tiers", "training", "drift", "jobs", "estimates", "co-serving")


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here comes from a hub
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.write_docs:
        _write_docs()
    else:
        _measure(options)


def _measure(options: argparse.Namespace) -> None:
    import torch
    from rich.console import Console

    from bench import report, results
    from bench.plan import Plan
    from bench.run import run

    console = Console()
    started = time.monotonic()
    cuda = torch.cuda.is_available()
    plan = Plan.quick(cuda) if options.quick else Plan.whole(cuda)
    with console.status("") as status:
        sections = run(plan, options.only, status.update if console.is_terminal else console.print)
    found = results.collect(plan, options.quick, sections)
    report.show(found.as_dict(), console)
    console.print(f"{time.monotonic() - started:.0f} seconds; goals and method: docs/benchmarks.md")
    is_whole = not (options.quick or options.only)
    directory = options.output or (results.DIRECTORY if is_whole else None)
    if directory is not None:
        console.print(f"written: {found.write(directory).name}")


def _write_docs() -> None:
    from bench import report, results

    found = results.newest()
    if found is None:
        raise SystemExit("bench/results/ is empty: run `python -m bench` first")
    report.write_document(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Speed as ratios, taken in one run.")
    parser.add_argument("--quick", action="store_true", help="small sizes, only to see that it runs")
    parser.add_argument(
        "--only", action="append", choices=NAMES, default=[], metavar="NAME", help=f"one of {', '.join(NAMES)}"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the results there, whatever was measured")
    parser.add_argument(
        "--write-docs", action="store_true", help="measure nothing: write the newest results into docs/benchmarks.md"
    )
    return parser


if __name__ == "__main__":
    main()
