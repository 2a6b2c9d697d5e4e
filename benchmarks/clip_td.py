"""Token distillation against its controls: every control × fraction × seed, and paired differences; resumes.

    python benchmarks/clip_td.py --task vqa --teacher local-dir:FOLDER --student test_resnet --size 64 --steps 150 \
        --fractions 0.01 0.1 --seeds 0 1 2 --test-domain held-out --out clip-td-vqa

Same pictures, order, steps and batch for every control; last weights, nothing is selected. A difference is
taken between runs of the same seed and fraction; its interval is Student's over the seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from edgekd.distill.vl.config import CONTROLS
from edgekd.vl import evaluate_vl, train_vl


def run_cell(arguments: argparse.Namespace, control: str, fraction: float, seed: int) -> dict[str, Any]:
    """Train one student and test it."""
    run = train_vl(
        task=arguments.task,
        data=arguments.data,
        teacher=arguments.teacher,
        student=arguments.student,
        student_weights=arguments.student_weights,
        student_options=json.loads(arguments.student_options),
        size=arguments.size,
        steps=arguments.steps,
        batch_size=arguments.batch,
        weight=arguments.weight,
        test_domain=arguments.test_domain,
        control=control,
        fraction=fraction,
        seed=seed,
        out=Path(arguments.out) / "run",
        overwrite=True,
    )
    rows = {row["suite"].split(":")[0]: row for row in evaluate_vl(run.folder, most=arguments.examples)}
    return {
        "control": control,
        "fraction": fraction,
        "seed": seed,
        "synthetic": run.record["synthetic"],
        "pictures": run.record["train_pictures"],
        "seconds": run.record["train_seconds"],
        **{suite: 100 * rows[suite]["accuracy"] for suite in ("id", "ood") if suite in rows},
        **{f"{suite}_constant": 100 * rows[suite]["majority"] for suite in ("id", "ood") if suite in rows},
    }


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Mean and half width of Student's 95 % interval; a single seed has none (nan)."""
    n = len(differences)
    half = float(student_t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return float(differences.mean()), half


def table(cells: list[dict[str, Any]], fraction: float, suite: str, method: str = "clip-td") -> list[str]:
    """Markdown rows: mean of each control over its seeds, and the method's paired difference from it."""
    own = {(c["control"], c["seed"]): c[suite] for c in cells if c["fraction"] == fraction and suite in c}
    lines = [f"| control | seeds | {suite} accuracy % | {method} − control |", "|---|---|---|---|"]
    for control in CONTROLS:
        seeds = sorted(seed for name, seed in own if name == control)
        if not seeds:
            continue
        mean = np.mean([own[control, seed] for seed in seeds])
        paired = np.array([own[method, s] - own[control, s] for s in seeds if (method, s) in own])
        text = "–"
        if control != method and len(paired):
            middle, half = interval(paired)
            text = f"{middle:+.1f} ± {half:.1f}"
        lines.append(f"| {control} | {len(seeds)} | {mean:.1f} | {text} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--task", default="vqa")
    parser.add_argument("--data")
    parser.add_argument("--teacher", default="toy")
    parser.add_argument("--student", default="test_resnet")
    parser.add_argument("--student-weights", type=Path)
    parser.add_argument("--student-options", default="{}", help="JSON, for timm.create_model")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--weight", type=float)
    parser.add_argument("--test-domain", default="none")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--controls", nargs="+", default=list(CONTROLS))
    parser.add_argument("--examples", type=int, default=3000, help="test examples per suite")
    parser.add_argument("--out", default="clip-td")
    arguments = parser.parse_args()
    path = Path(arguments.out) / "cells.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(c["control"], c["fraction"], c["seed"]) for c in cells}
    for seed in arguments.seeds:
        for fraction in arguments.fractions:
            for control in arguments.controls:
                if (control, fraction, seed) not in done:
                    cells.append(run_cell(arguments, control, fraction, seed))
                    with open(path, "a", encoding="utf-8") as handle:
                        handle.write(json.dumps(cells[-1]) + "\n")
                    print(cells[-1], flush=True)
    mark = " (synthetic)" if cells and cells[0]["synthetic"] else ""
    for fraction in arguments.fractions:
        for suite in ("id", "ood"):
            own = [c for c in cells if c["fraction"] == fraction and suite in c]
            if own:
                constant = f"constant answer {own[0][f'{suite}_constant']:.1f} %"
                print(
                    f"\n{arguments.task}{mark}, {own[0]['pictures']} training pictures ({fraction:.0%}), {constant}\n"
                )
                print("\n".join(table(cells, fraction, suite)))


if __name__ == "__main__":
    main()
