"""What training costs in memory: added to a service that runs anyway, or as a second QLoRA process beside it.

`python -m bench.memory service|peft DIRECTORY` is one of the two, in a process of its own, and writes one JSON object.
On a CPU private memory counts (anonymous pages; the libraries' code is shared by all processes), on a GPU what torch
allocates there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from transformers.utils import logging as transformers_logging

from bench.goals import goal
from bench.learner import learning
from bench.measurement import Entry, quantity, ratio
from bench.serving import Row, random_prompts, serving
from bench.subject import Sizes, Subject
from bench.training import BATCH_SIZE, PeftLoop, make_trainer, random_corpus
from service.engine.base_model import BaseModel, load_base_model

NUM_STEPS = 3
RATIO = "memory that training adds ÷ a second QLoRA process"
_MIB = 1 << 20
_SAMPLE_SECONDS = 0.002


def entries(subject: Subject) -> list[Entry]:
    """One training step has 16 examples of 20 to 60 tokens on both sides."""
    service, peft = (_child(kind, subject) for kind in ("service", "peft"))
    samples = {
        "the service, serving.memory": [service["before"] / _MIB],
        "what training adds.memory": [(service["peak"] - service["before"]) / _MIB],
        "a second QLoRA process.memory": [peft["peak"] / _MIB],
    }
    adds, second = "what training adds.memory", "a second QLoRA process.memory"
    target = goal(RATIO, cuda=subject.is_cuda)
    return [*(quantity(name, samples, "MiB") for name in samples), ratio(RATIO, samples, adds, second, target)]


def _child(kind: str, subject: Subject) -> dict[str, int]:
    arguments = [sys.executable, "-m", "bench.memory", kind, str(subject.directory), json.dumps(asdict(subject.sizes))]
    root = str(Path(__file__).resolve().parent.parent)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True, timeout=600, env=environ)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@dataclass
class _Peak:
    """Bytes: at the beginning, and the most there were."""

    before: int
    peak: int


@contextmanager
def _watching(device: torch.device) -> Iterator[_Peak]:
    """`peak` is right when the block has ended."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        found = _Peak(torch.cuda.memory_allocated(device), 0)
        yield found
        found.peak = torch.cuda.max_memory_allocated(device)
        return
    found, ended = _Peak(_private_bytes(), 0), threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            found.peak = max(found.peak, _private_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def _private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not tell private memory (RssAnon)")


def _service(directory: Path, sizes: Sizes) -> _Peak:
    base = load_base_model(str(directory), quantization="nf4", name="bench")
    subject = Subject(directory, sizes, base, {})
    rows = [Row(prompt) for prompt in random_prompts(sizes.vocabulary, 8, 32, 64, seed=4)]
    with serving(base, {}, max_num_seqs=8) as rig:
        rig.run(rows, 32)
        with _watching(base.device) as found:
            trainer = make_trainer(subject, random_corpus(sizes.vocabulary, NUM_STEPS * BATCH_SIZE), BATCH_SIZE)
            with learning(trainer) as learner:
                learner.start()
                while learner.num_steps < NUM_STEPS:
                    rig.run(rows, 8)
    return found


def _peft(directory: Path, sizes: Sizes) -> _Peak:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = cast(BaseModel, SimpleNamespace(device=device))  # the peer is asked for nothing else of ours
    with _watching(device) as found:
        loop = PeftLoop(Subject(directory, sizes, base, {}), random_corpus(sizes.vocabulary, NUM_STEPS * BATCH_SIZE))
        for step in range(NUM_STEPS):
            loop.step(step)
    return found


def main(kind: str, directory: Path, sizes: Sizes) -> None:
    transformers_logging.disable_progress_bar()
    found = {"service": _service, "peft": _peft}[kind](directory, sizes)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Sizes(**json.loads(sys.argv[3])))
