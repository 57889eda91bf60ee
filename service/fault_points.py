"""Kills or stops this process at a named step of a job, for tests that want to see it taken up again. Knows no job.

Off unless `ROOTSTOCK_TEST_FAULT` is set in the process's own environment, which only its starter can do, who could
kill it as well: `kill:publish.renamed:2` is a real SIGKILL when that step is reached for the second time, `stop:…` a
SIGSTOP. No request, setting or file can arm it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping

from adapters.steps import Reached, unwatched
from service.config import SettingsError

VARIABLE = "ROOTSTOCK_TEST_FAULT"

STEPS = (
    "claim.taken",  # in the transaction
    "claim.committed",
    "data.read",
    "data.validated",
    "train.evaluated",
    "train.stepped",
    "resume.written",  # the state is on the disk, the job's row does not know it
    "resume.referenced",
    "reference.made",
    "publish.copied",  # the files are in a directory of another name
    "publish.synced",
    "publish.renamed",
    "publish.durable",
    "checkpoint.listed",
    "evaluation.done",
    "results.staged",
    "pointer.fenced",  # in the transaction that ends the job, its row is written
    "pointer.alias",  # … the alias is moved, or left
    "pointer.written",  # … all is written
    "pointer.committed",
    "job.swept",  # its resume points are removed
    "alias.moved",  # by a request, in the transaction
    "alias.committed",
)
"""Of a job from its claim to its end, and of a request that moves an alias."""

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def fault_point(environ: Mapping[str, str]) -> Reached:
    """What to call at each step. Raises SettingsError for a fault that is none."""
    armed = environ.get(VARIABLE)
    if not armed:
        return unwatched
    kind, _, rest = armed.partition(":")
    step, _, number = rest.partition(":")
    if kind not in _SIGNALS or step not in STEPS or not (number or "1").isdecimal() or number == "0":
        raise SettingsError(f"{VARIABLE}={armed}: write kill|stop, a step of {', '.join(STEPS)}, and which time: k:s:1")
    return _Fault(_SIGNALS[kind], step, int(number or "1"))


class _Fault:
    """Any thread may come by; one of them is the n-th."""

    def __init__(self, number: signal.Signals, step: str, arrivals: int) -> None:
        self._signal, self._step, self._left = number, step, arrivals
        self._lock = threading.Lock()

    def __call__(self, step: str) -> None:
        if step != self._step:
            return
        with self._lock:
            self._left -= 1
            due = self._left == 0
        if due:
            os.kill(os.getpid(), self._signal)
