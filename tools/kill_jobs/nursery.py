"""`python -m tools.kill_jobs.nursery`: a process that has imported everything and forks services off, so that a start
takes a second. Knows no job and no kill.

Each line on stdin is `{"settings": …, "environment": …, "log": PATH}`; the answer is the new process's id. When that
process ends, a line `{"ended": PID, "status": N}` follows. A fork happens before there is any thread.
"""

from __future__ import annotations

import json
import os
import select
import sys
from typing import Any


def main() -> None:
    import service.app
    import service.engine_room
    import service.server  # noqa: F401  (this is what takes the seconds)

    print(json.dumps({"ready": os.getpid()}), flush=True)
    while True:
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], 0.02)
        while (ended := os.waitpid(-1, os.WNOHANG) if _has_children() else (0, 0))[0]:
            print(json.dumps({"ended": ended[0], "status": ended[1]}), flush=True)
        if readable:
            line = sys.stdin.readline()
            if not line:
                return
            print(json.dumps({"started": _fork(json.loads(line))}), flush=True)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _fork(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        _serve(order)
        status = 0
    finally:
        os._exit(status)


def _serve(order: dict[str, Any]) -> None:
    from service.config import load_settings
    from service.log import configure_logging
    from service.server import serve

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["environment"])
    settings = load_settings(order["settings"])
    configure_logging(settings.log_level, settings.log_format)
    serve(settings)


if __name__ == "__main__":
    main()
