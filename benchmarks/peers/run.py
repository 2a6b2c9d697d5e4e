"""Train the same student with every program, one after the other, and print the table.

    python benchmarks/peers/run.py --environments DIR --assets ASSETS --pictures DIR --out DIR [--steps 45]

`environments.sh` makes the environments, `pictures.py` the pictures. images/s is the median of short trainings in
which the programs take turns; edgekd's are with a filled cache. The long trainings start with an empty cache. Times are
those of the processor, with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
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


def train(given: argparse.Namespace, name: str, out: Path, *more: str) -> dict[str, Any] | None:
    """Run one program in its environment; None where it fails, with the end of its output printed."""
    environment, (script, *options) = PROGRAMS[name]
    python = given.environments / environment / "bin" / "python"
    cache = given.out / "cache" if "--speed" in more else out / "cache"
    command = [str(python), str(HERE / script), *options]
    for flag in ("assets", "pictures"):
        command += [f"--{flag}", str(getattr(given, flag))]
    variables = {"OMP_NUM_THREADS": "1", "EDGEKD_CACHE": str(cache)}
    done = subprocess.run(
        [*command, "--out", str(out), *more],
        capture_output=True, text=True, check=False, env=os.environ | variables,
    )  # fmt: skip
    if done.returncode:
        print(f"{name} failed:\n{done.stderr[-2000:]}", flush=True)
        return None
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for flag in ("environments", "assets", "pictures", "out"):
        parser.add_argument(f"--{flag}", type=lambda text: Path(text).absolute(), required=True)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--target", type=float, default=60.0, help="validation accuracy, percent")
    given = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for number in range(given.rounds):
        for name in PROGRAMS:
            out = given.out / f"speed-{number}-{name.replace(' ', '-')}"
            if made := train(given, name, out, "--speed", "--steps", "8"):
                rates[name].append(made["images_per_second"])
                print(f"{name}: {rates[name][-1]:.1f} images/s", flush=True)
    print(
        f"| program | images/s | s to {given.target:.0f} % of val | s in all | val, % | test, % | unseen, % |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in PROGRAMS:
        out = given.out / name.replace(" ", "-")
        if (made := train(given, name, out, "--steps", str(given.steps))) is None:
            continue
        curve = made["curve"]
        reached = [point["seconds"] for point in curve if point["val"] >= given.target]
        cells = [
            f"{statistics.median(rates[name]):.1f}" if rates[name] else "",
            f"{reached[0]:.0f}" if reached else "not reached",
            f"{curve[-1]['seconds']:.0f}",
            *(f"{value:.1f}" for value in (curve[-1]["val"], made["test"], made["unseen"])),
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
