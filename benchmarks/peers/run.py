"""Train the same student with every program, one after the other, and print the table.

    python benchmarks/peers/run.py --environments DIR --assets ASSETS --pictures DIR --out DIR [--steps 36]

`environments.sh` creates the environments and `pictures.py` the images. Times are processor time with one thread, so
that other load has little effect. edgekd starts with an empty cache: its seconds include the teacher's passes, but its
images/s are only for the training steps. LightlyTrain's images/s are for its distillation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROGRAMS = {
    "edgekd kd": ("edgekd", ["train_edgekd.py"]),
    "edgekd": ("edgekd", ["train_edgekd.py", "--recipe", "edgekd"]),
    "timm": ("timm", ["train_timm.py"]),
    "torchdistill": ("torchdistill", ["train_torchdistill.py"]),
    "LightlyTrain": ("lightly", ["train_lightly.py"]),
}


def train(given: argparse.Namespace, name: str) -> dict[str, Any] | None:
    """Run one program in its environment; if it fails, print the end of its output and return None."""
    environment, (script, *options) = PROGRAMS[name]
    out = given.out / name.replace(" ", "-")
    command = [str(given.environments / environment / "bin" / "python"), str(HERE / script)]
    for flag in ("assets", "pictures", "steps"):
        options += [f"--{flag}", str(getattr(given, flag))]
    done = subprocess.run(
        [*command, *options, "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "EDGEKD_CACHE": str(out / "cache")},
    )
    if done.returncode:
        print(f"{name} failed:\n{done.stderr[-2000:]}", flush=True)
        return None
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for flag in ("environments", "assets", "pictures", "out"):
        parser.add_argument(f"--{flag}", type=lambda text: Path(text).absolute(), required=True)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--target", type=float, default=60.0, help="validation accuracy, percent")
    given = parser.parse_args()
    reach = f"s to {given.target:.0f} % of val"
    print(f"| program | images/s | {reach} | s in all | val, % | test, % | unseen, % |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in PROGRAMS:
        if (made := train(given, name)) is None:
            continue
        curve = made["curve"]
        reached = [point["seconds"] for point in curve if point["val"] >= given.target]
        cells = [
            f"{made['images_per_second']:.1f}",
            f"{reached[0]:.0f}" if reached else "not reached",
            f"{curve[-1]['seconds']:.0f}",
            *(f"{value:.1f}" for value in (curve[-1]["val"], made["test"], made["unseen"])),
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
