"""Requests written down after the API's own description: `python -m tests.hostile.generated --examples 100`.

schemathesis in all its phases, with every check of its answers that does not contradict this API's ways. Knows no case.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.hostile.description import linked
from tests.service.http_fixtures import ADMIN_KEY, Served, serve_fake

PHASES = ("examples", "coverage", "fuzzing", "stateful")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "use_after_free",
    "ensure_resource_availability",
)
"""Left out: `positive_data_acceptance` (a request may be right and still meet a state that refuses it, which is a 400
here), and those of authorisation, which `tests/service/test_errors.py` tries on every route."""
PATIENCE_SECONDS = 40
"""Longer than the service's own for a body that does not come."""


@dataclass(frozen=True)
class Tried:
    num_cases: int
    failures: str
    """What schemathesis says; empty when it has nothing to say."""


def tried(served: Served, examples: int, phases: Sequence[str] = PHASES) -> Tried:
    """All operations, a tenant's with a tenant's key, the administrator's with its own."""
    with TemporaryDirectory() as name:
        description = Path(name) / "openapi.json"
        description.write_text(json.dumps(linked(served.api.openapi())))
        chosen = (
            (served.control.acme_key, "--exclude-path-regex"),
            (ADMIN_KEY, "--include-path-regex"),
        )
        runs = [_run(served.url, description, key, [option, "/admin/"], examples, phases) for key, option in chosen]
    return Tried(sum(run.num_cases for run in runs), "".join(run.failures for run in runs))


def _run(url: str, description: Path, key: str, chosen: Sequence[str], examples: int, phases: Sequence[str]) -> Tried:
    report = description.with_suffix(".report.json")
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(description), "--url", url]
    command += ["--header", f"authorization: Bearer {key}", *chosen, "--phases", ",".join(phases)]
    command += ["--checks", ",".join(CHECKS), "--max-examples", str(examples), "--continue-on-failure"]
    command += ["--generation-deterministic", "--suppress-health-check", "all", "--warnings", "off", "--no-color"]
    command += ["--request-timeout", str(PATIENCE_SECONDS), "--report", "json", "--report-json-path", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=description.parent)
    failures = "" if done.returncode == 0 else done.stdout[-20_000:] + done.stderr[-2000:]
    return Tried(_num_cases(report), failures)


def _num_cases(report: Path) -> int:
    counted = json.loads(report.read_text())
    return int(counted["test_cases"]["generated"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.generated", description=__doc__)
    parser.add_argument("--examples", type=int, default=100, help="of each operation, in the phases that have them")
    arguments = parser.parse_args()
    with TemporaryDirectory() as directory, serve_fake(Path(directory)) as served:
        found = tried(served, arguments.examples)
    print(f"{found.num_cases} generated requests")
    print(found.failures or "no failure")
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
