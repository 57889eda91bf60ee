"""`python -m tools.kill_jobs --kills 200 --seed 1 --base DIR`: kill -9 at every named step and at any time.

Real services on one data directory, each killed and followed by the next; tenants that go on asking meanwhile; then
the last one finishes what is left, and what was acknowledged, stored and booked is compared with what must be. A
violation ends with status 1. The same seed makes the same plan; at which instant a kill hits is the machine's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from service.config import BUNDLED_BASE
from tools.kill_jobs.run import KillRun, undisturbed
from tools.kill_jobs.victims import nursery


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.kill_jobs", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", default=str(BUNDLED_BASE), help="directory of the base; a tiny random one is quick")
    parser.add_argument("--database-url", help="an empty Postgres database; unset, SQLite")
    parser.add_argument("--training-jobs", type=int, default=2, help="trained at once")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop killing after so long")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="rootstock-kills-"))
    start = time.monotonic()
    with nursery() as born:
        expected = undisturbed(born, directory / "undisturbed", options.base)
        run = KillRun(
            born,
            directory / "killed",
            options.base,
            seed=options.seed,
            database_url=options.database_url,
            training_jobs=options.training_jobs,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        violations = run.execute(options.kills, expected, options.seconds)
    told = {"seed": options.seed, "seconds": round(time.monotonic() - start), **run.counts(), "violations": violations}
    print(json.dumps(told, indent=2))
    if violations:
        print(f"the evidence is in {directory}", file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
