"""The short version of scripts/kill_test.py; the long one is run by hand, and docs/train.md has its figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_test.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_what_is_killed_and_goes_on_gives_the_same_files() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--moments", "1", "--load", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("1 of 1") == 6
