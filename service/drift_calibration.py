"""Thresholds of an answer monitor, computed by a child process behind everybody. Knows no stream.

It is seconds of work, and numpy holds the interpreter through most of it: as a thread of the API's process, even a
niced one, it made the event loop late by 100 ms. `python -m service.drift_calibration RUN_LENGTH SEED` reads a
monitor's state on stdin and writes it, calibrated, to stdout.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass

import structlog

from adapters.drift.output_monitor import OutputMonitor
from adapters.thread_priority import lower_priority
from service.drift_intake import StreamKey

log = structlog.get_logger("service.drift")

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Calibrated:
    """`state` is None when it failed."""

    key: StreamKey
    state: bytes | None


class CalibrationProcess:
    """One at a time."""

    def __init__(self, run_length: float) -> None:
        self._run_length = run_length
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._done: Calibrated | None = None

    @property
    def is_busy(self) -> bool:
        """Also while a result has not been taken."""
        return self._thread is not None

    def start(self, key: StreamKey, seed: int, state: bytes) -> None:
        assert not self.is_busy
        self._process = subprocess.Popen(
            [sys.executable, "-m", "service.drift_calibration", repr(self._run_length), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **ONE_THREAD},
        )
        self._thread = threading.Thread(
            target=self._wait, args=(self._process, key, state), name="drift-calibration", daemon=True
        )
        self._thread.start()

    def take(self) -> Calibrated | None:
        """What came of it, once."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread.join()
        done, self._thread, self._process = self._done, None, None
        return done

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
        if self._thread is not None:
            self._thread.join()

    def _wait(self, process: subprocess.Popen[bytes], key: StreamKey, state: bytes) -> None:
        try:
            output, complaint = process.communicate(state)
        except (OSError, ValueError):  # it was killed before it had read everything
            output, complaint = b"", b""
        whole = process.returncode == 0 and bool(output)
        if not whole and process.returncode != -9:
            last = complaint.decode(errors="replace").strip().rsplit("\n", 1)[-1]
            log.error("drift_calibration_failed", digest=key[1], status=process.returncode, reason=last)
        self._done = Calibrated(key, output if whole else None)


def main() -> None:
    """In the child, which ends with its parent."""
    lower_priority()
    run_length, seed = float(sys.argv[1]), int(sys.argv[2])
    monitor = OutputMonitor(run_length, seed, sys.stdin.buffer.read())
    parent = os.getppid()

    def check() -> None:
        if os.getppid() != parent:
            sys.exit(1)

    monitor.calibrate(check)
    sys.stdout.buffer.write(monitor.state_dict())


if __name__ == "__main__":
    main()
