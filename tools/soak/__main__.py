"""`python -m tools.soak --minutes 20`: status 0 when nothing was lost, wrong, leaked or growing."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from rich.console import Console

from tools.soak.house import SERVICE
from tools.soak.plan import Plan
from tools.soak.planted import PROGRAM
from tools.soak.report import show
from tools.soak.run import soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="of traffic; memory is judged from 5 on")
    parser.add_argument("--tenants", type=int, default=30)
    parser.add_argument("--seed", type=int, default=20, help="of what tenants do, not of when they come to it")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--planted-leaks", action="store_true", help="soak a service that leaks, to see it found")
    arguments = parser.parse_args()
    console = Console()
    plan = Plan(arguments.minutes, arguments.tenants, arguments.seed)
    program = PROGRAM if arguments.planted_leaks else SERVICE
    outcome = asyncio.run(soak(plan, console.print, program=program))
    show(outcome, console)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(outcome.summary(), indent=1) + "\n")
    return 1 if outcome.ledger.num_violations else 0


if __name__ == "__main__":
    sys.exit(main())
