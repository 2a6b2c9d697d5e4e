"""Runs trainings for test_train.py outside the test's own process, where they can be killed or started several at once.

python train_worker.py kill CONFIG.json STEP [STEP …]
    For every STEP, in a forked child that SIGKILLs itself right after that step, train to `<out>-killed-<STEP>`.
python train_worker.py train CONFIG.json
    Train; under torchrun every process does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from edgekd.configs.train import TrainConfig
from edgekd.core.errors import Stopped
from edgekd.distill.progress import Progress
from edgekd.distill.train import train


def die_after(step: int) -> None:
    """Make this process SIGKILL itself once `step` steps are done and written down."""
    record = Progress.step

    def deadly(self: Progress, number: int, *args: Any) -> None:
        record(self, number, *args)
        if number + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Progress.step = deadly  # type: ignore[method-assign, assignment]


def main() -> None:
    settings = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    if sys.argv[1] == "train":
        try:
            train(TrainConfig.model_validate(settings))
        except Stopped as stopped:
            print(stopped.message, file=sys.stderr)
            sys.exit(stopped.exit_code)
        return
    # Forking saves starting Python and importing torch anew; nothing here may compute before the fork.
    torch.set_num_threads(1)
    for step in map(int, sys.argv[3:]):
        child = os.fork()
        if child == 0:
            die_after(step)
            train(
                TrainConfig.model_validate(settings | {"out": f"{settings['out']}-killed-{step}"})
            )
            os._exit(1)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise SystemExit(
                f"the training to be killed after step {step} ended with status {status}"
            )


if __name__ == "__main__":
    main()
