"""Compare token distillation with controls for every task, share of labels and seed, with paired differences.

    python benchmarks/clip_td.py --assets assets --out clip-td

The student reads the features of a frozen ImageNet backbone. All controls use the same images, order, steps and batch
size. The last weights are tested, without selection. Every run is tested in domain and under a shift: held-out
colour-shape pairs (vqa), or a style left out (ve, choice). Each finished run is a line of cells.jsonl; the same command
resumes, and `--minutes` limits its time.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from cells import Cell, finished

from edgekd.configs.vl import VlTrainConfig
from edgekd.distill.vl.run import evaluate_vl
from edgekd.distill.vl.train import train_vl
from edgekd.studies.tables import stat, t_interval

CONTROLS = ("none", "pooled-only", "uniform", "random-tokens", "clip-td", "question-only")
STEPS = {"vqa": 120, "ve": 240, "choice": 120}
SUITES = {"id": "in domain", "ood": "shifted"}


def run_cell(
    arguments: argparse.Namespace, task: str, fraction: float, seed: int, control: str
) -> Cell:
    """Train and test one student."""
    assets = Path(arguments.assets)
    own = task == "vqa"
    config = VlTrainConfig.load(
        **{
            "task": task,
            "data": "easy-vqa" if own else str(assets / "pacs"),
            "test_domain": "held-out" if own else arguments.style,
            "teacher": f"local-dir:{assets / 'teachers' / 'miniclip'}",
            "student": "tf_efficientnet_lite0",
            "student_weights": assets / "students" / "tf_efficientnet_lite0.safetensors",
            "freeze_backbone": True,
            "size": 96,
            "width": 64,
            "steps": STEPS[task],
            "batch_size": 32,
            "control": control,
            "fraction": fraction,
            "seed": seed,
            "out": Path(arguments.out) / "run",
            "overwrite": True,
        }
    )
    run = train_vl(config)
    rows = {row["suite"].split(":")[0]: row for row in evaluate_vl(run, most=arguments.examples)}
    return {
        "task": task,
        "fraction": fraction,
        "seed": seed,
        "control": control,
        "synthetic": run.record["synthetic"],
        "pictures": run.record["train_pictures"],
        "seconds": run.record["train_seconds"],
        **{suite: 100 * rows[suite]["accuracy"] for suite in SUITES},
        **{f"{suite}_constant": 100 * rows[suite]["majority"] for suite in SUITES},
        **{f"{suite}_examples": rows[suite]["n"] for suite in SUITES},
    }


def compared(cells: list[Cell], suite: str, control: str, baseline: str) -> str:
    """Return the mean paired difference and its 95 % interval (Student's t) over the runs: `+0.4 [−0.1, +0.9]`."""
    own, other = (
        {(c["fraction"], c["seed"]): c[suite] for c in cells if c["control"] == name}
        for name in (control, baseline)
    )
    differences = [own[pair] - other[pair] for pair in own if pair in other]
    if control == baseline or not differences:
        return ""
    found, interval = stat(differences), t_interval(differences)
    assert found is not None
    return f"{found.mean:+.1f}" + (f" [{interval[0]:+.1f}, {interval[1]:+.1f}]" if interval else "")


def accuracy_table(cells: list[Cell], task: str, suite: str, baseline: str) -> list[str]:
    """Return Markdown with a row per control: mean ± standard error and difference to `baseline` per label share."""
    parts = sorted({c["fraction"] for c in cells})
    head = "".join(f" {part:.0%} | − {baseline} |" for part in parts)
    lines = [f"| {task}, {SUITES[suite]} |{head}", "|---|" + "---|---|" * len(parts)]
    for control in CONTROLS:
        entries = []
        for part in parts:
            here = [c for c in cells if c["fraction"] == part]
            found = stat([c[suite] for c in here if c["control"] == control])
            text = f"{found.mean:.1f} ± {found.error:.1f} ({found.seeds})" if found else "–"
            entries.append(f" {text} | {compared(here, suite, control, baseline)} |")
        lines.append(f"| `{control}` |" + "".join(entries))
    constant = "".join(
        f" {next(c[f'{suite}_constant'] for c in cells if c['fraction'] == p):.1f} | |"
        for p in parts
    )
    return [*lines, f"| constant answer |{constant}"]


def method_table(cells: list[Cell], method: str = "clip-td") -> list[str]:
    """Return Markdown with a row per task and suite: the method minus each control, over all shares and seeds."""
    others = [name for name in CONTROLS if name != method]
    head = " | ".join(f"− `{name}`" for name in others)
    lines = [f"| `{method}`, all parts | {head} |", "|---|" + "---|" * len(others)]
    for task in dict.fromkeys(c["task"] for c in cells):
        own = [c for c in cells if c["task"] == task]
        for suite, title in SUITES.items():
            texts = [compared(own, suite, method, name) for name in others]
            lines.append(f"| {task}, {title} | " + " | ".join(texts) + " |")
    return lines


def report(cells: list[Cell]) -> str:
    """Return all tables as Markdown."""
    lines = []
    for task in dict.fromkeys(c["task"] for c in cells):
        own = [c for c in cells if c["task"] == task]
        mark = " (synthetic)" if own[0]["synthetic"] else ""
        pictures = ", ".join(
            f"{part:.0%}: {next(c['pictures'] for c in own if c['fraction'] == part):,}"
            for part in sorted({c["fraction"] for c in own})
        )
        tested = " and ".join(
            f"{own[0][f'{suite}_examples']:,} {title}" for suite, title in SUITES.items()
        )
        lines += [
            f"**{task}**{mark}: training pictures {pictures}; {tested} test examples; number of seeds in brackets.",
            "",
        ]
        for suite in SUITES:
            lines += [*accuracy_table(own, task, suite, "none"), ""]
    return "\n".join([*lines, *method_table(cells), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--assets", required=True, help="folder with pacs, students and teachers")
    parser.add_argument("--out", default="clip-td")
    parser.add_argument("--tasks", nargs="+", default=["vqa", "ve", "choice"])
    parser.add_argument(
        "--style", default="sketch", help="PACS domain that ve and choice leave out"
    )
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--controls", nargs="+", default=list(CONTROLS), choices=CONTROLS)
    parser.add_argument("--examples", type=int, default=800, help="test examples per suite")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="time after which no run is started"
    )
    arguments = parser.parse_args()
    wanted = [
        (task, fraction, seed, control)
        for seed in arguments.seeds
        for task in arguments.tasks
        for fraction in arguments.fractions
        for control in arguments.controls
    ]
    fields, run = ("task", "fraction", "seed", "control"), functools.partial(run_cell, arguments)
    cells, count = finished(
        Path(arguments.out) / "cells.jsonl", fields, wanted, run, arguments.minutes
    )
    print(f"{count} of {len(wanted)} runs are finished.\n")
    print(report(cells))


if __name__ == "__main__":
    main()
