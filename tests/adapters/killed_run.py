"""A training process to be killed: trains step after step and keeps its state in a file after each, as a worker does.

`python -m tests.adapters.killed_run BASE STATE NUM_STEPS` resumes from STATE where it exists, and at its end prints a
digest of all masters and of the history.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch

from adapters.durable import write_file
from adapters.trainer import Trainer
from tests.adapters.conftest import TemplateCodec, graft_base
from tests.adapters.corpora import CONFIG, bits, chats, make_trainer, run


def main(base_dir: Path, state: Path, num_steps: int) -> None:
    torch.set_num_threads(1)
    codec = TemplateCodec(base_dir)
    trainer = make_trainer(graft_base(base_dir), chats(codec), chats(codec, 6, seed=1), CONFIG)
    if state.exists():
        trainer.load_state_dict(torch.load(state, weights_only=True))
        print(f"resumed {trainer.steps_done}", flush=True)
    while trainer.steps_done < num_steps:
        run(trainer, 1)
        _save(trainer, state)
        print(f"step {trainer.steps_done}", flush=True)
    digest = hashlib.sha256(b"".join(bits(trainer)) + repr((trainer.history, trainer.scores)).encode())
    print(f"digest {digest.hexdigest()}", flush=True)


def _save(trainer: Trainer, path: Path) -> None:
    scratch = path.with_suffix(".new")
    torch.save(trainer.state_dict(), scratch)
    write_file(path, [scratch.read_bytes()])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
