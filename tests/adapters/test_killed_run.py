"""`kill -9` in the middle of a run, and another process goes on: the same run to the last bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

NUM_STEPS = 10


def _start(base: Path, state: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.adapters.killed_run", str(base), str(state), str(NUM_STEPS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _digest(process: subprocess.Popen[str]) -> tuple[str, list[str]]:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    *lines, last = output.splitlines()
    return last, lines


@pytest.mark.slow
def test_a_run_killed_with_signal_9_and_resumed_in_a_new_process_is_the_same_run(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    straight, _ = _digest(_start(tiny_llama_dir, tmp_path / "straight.pt"))
    killed = _start(tiny_llama_dir, tmp_path / "killed.pt")
    assert killed.stdout is not None
    for line in killed.stdout:
        if line == "step 4\n":
            break
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=30)
    assert killed.returncode == -signal.SIGKILL
    resumed, lines = _digest(_start(tiny_llama_dir, tmp_path / "killed.pt"))
    assert lines[0].startswith("resumed ") and 4 <= int(lines[0].split()[1]) < NUM_STEPS
    assert resumed == straight
    assert resumed.startswith("digest ")
