"""`python -m tools.migration "what it does"`: the next step of the schema, written from how `service.tables` differs
from the newest one. Read what it wrote: a column that became another looks like one lost and one new.

`python -m tools.migration --baseline` writes the first step anew, and the dump of a database of it that the tests
migrate. Only while it is the only one, so before the first release.
"""

from __future__ import annotations

import argparse
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

from alembic import command

from service.database import connect, open_engine
from service.schema import BASELINE, MIGRATIONS, config_for, migrate
from tests.filled_database import fill

VERSIONS = MIGRATIONS / "versions"
DUMP = Path(__file__).resolve().parent.parent / "tests" / "service" / f"schema_{BASELINE}.sql"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("message", nargs="?", default="the first release")
    parser.add_argument("--baseline", action="store_true")
    chosen = parser.parse_args()
    steps = sorted(VERSIONS.glob("[0-9]*.py"))
    if chosen.baseline:
        if len(steps) > 1:
            sys.exit("there are later steps: the baseline is what a release has, and stays")
        for step in steps:
            step.unlink()
        write_step(BASELINE, chosen.message)
        write_dump()
    else:
        write_step(f"{len(steps) + 1:04d}", chosen.message)


def write_step(revision: str, message: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        engine = open_engine(f"sqlite:///{directory}/empty.db")
        with engine.begin() as connection:
            config = config_for(connection)
            config.attributes["render_as_batch"] = revision != BASELINE
            if revision != BASELINE:
                migrate(config)
            script = command.revision(config, message, autogenerate=True, rev_id=revision)
        engine.dispose()
    path = Path(script.path)  # type: ignore[union-attr]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "###" not in line))
    for ruff in (["format", "--quiet"], ["check", "--quiet", "--fix"]):
        subprocess.run([sys.executable, "-m", "ruff", *ruff, str(path)], check=True)
    print(f"wrote {path}")


def write_dump() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/filled.db"
        database = connect(f"sqlite:///{path}")
        with database.begin() as connection:
            fill(connection, "tenant-1", "some")
        database.close()
        with sqlite3.connect(path) as opened:
            DUMP.write_text("\n".join(opened.iterdump()) + "\n")
    print(f"wrote {DUMP}")


if __name__ == "__main__":
    main()
