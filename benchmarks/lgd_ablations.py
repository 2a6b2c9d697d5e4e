"""Compare `lgd` with variants: without its textual or visual bank, with another vocabulary, and plain regression.

    python benchmarks/lgd_ablations.py --assets assets --out lgd

The data is PACS with one style unseen and no labels in training. Every variant trains the same student on the same
order of views for the same number of steps, and differences are paired over seeds. Each finished run is a line of
cells.jsonl; the same command resumes.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
from cells import Cell, finished

from edgekd.benchmark.evaluate.metrics import top1
from edgekd.configs.train import TrainConfig
from edgekd.distill.classification.load_run import load_run
from edgekd.distill.classification.predict import predict_all, probe_scores, student_predict
from edgekd.distill.train import train
from edgekd.studies.tables import stat, t_interval

OTHER_NAMES = (
    "apple",
    "bicycle",
    "bridge",
    "candle",
    "chair",
    "clock",
    "lamp",
    "mountain",
    "spoon",
    "train",
)
VARIANTS: dict[str, dict[str, Any]] = {
    "lgd": {},
    "no visual bank": {"stages": {"train": {"terms": {"visual_soft_ce": 0}}}},
    "no textual bank": {"stages": {"train": {"terms": {"text_soft_ce": 0}}}},
    "vocabulary of other names": {"vocabulary": "other"},
    "not distilled": {"steps": 1},
    "clip-mse": {"recipe": "clip-mse", "prompts": "imagenet80", "projector": "mlp"},
}
MEASURES = {"zero": "zero-shot", "linear": "linear probe", "knn": "20 nearest"}


def accuracies(
    scores: dict[str, Any], labels: np.ndarray, tests: dict[str, np.ndarray]
) -> dict[str, float]:
    """Return percent by `measure suite`; `scores` are of all tested images in the order of `tests`."""
    found, first = {}, 0
    for suite, indices in tests.items():
        rows = slice(first, first + len(indices))
        found |= {
            f"{name} {suite}": 100 * top1(values[rows], labels[indices])
            for name, values in scores.items()
        }
        first += len(indices)
    return found


def run_cell(arguments: argparse.Namespace, variant: str, seed: int) -> Cell:
    """Distil one student without labels; evaluate its text head, and classifiers fitted on its features."""
    out = Path(arguments.out)
    changes = dict(VARIANTS[variant])
    if changes.get("vocabulary"):
        changes["vocabulary"] = out / "other-names.txt"
        changes["vocabulary"].write_text("\n".join(OTHER_NAMES) + "\n", encoding="utf-8")
    assets = Path(arguments.assets)
    given = {
        "data": str(assets / "pacs"),
        "teacher": f"local-dir:{assets / 'teachers' / 'miniclip'}",
        "student": "tf_efficientnet_lite0",
        "student_weights": assets / "students" / "tf_efficientnet_lite0.safetensors",
        "test_domain": arguments.style,
    }
    budget = {"size": 96, "batch_size": 32, "steps": arguments.steps, "seed": seed}
    config = TrainConfig.load(
        **{"recipe": "lgd", **given, **budget, "out": out / "run", "overwrite": True, **changes}
    )
    started = time.monotonic()
    loaded = load_run(train(config).folder)
    images, split = loaded.data()
    tests = {"ID": split.id_test, "OOD": split.ood_test}
    tested = np.concatenate(list(tests.values()))
    predict = student_predict(loaded.student, loaded.vectors)
    scores = {"zero": predict_all(predict, images, tested, loaded.run.preprocess)}
    scores |= probe_scores(loaded.student, images, split.train, tested)
    seconds = time.monotonic() - started
    return {
        "variant": variant,
        "seed": seed,
        "seconds": seconds,
        **accuracies(scores, images.labels, tests),
    }


def entry(cells: list[Cell], variant: str, column: str) -> str:
    """Return `71.2 ± 0.3`, followed by `lgd`'s lead with its interval."""
    own, lgd = (
        {c["seed"]: c[column] for c in cells if c["variant"] == name and column in c}
        for name in (variant, "lgd")
    )
    found = stat(list(own.values()))
    if found is None:
        return "–"
    text = f"{found.mean:.1f} ± {found.error:.1f}"
    differences = [lgd[seed] - own[seed] for seed in own if seed in lgd]
    interval = t_interval(differences) if variant != "lgd" else None
    return text + (
        f" ({np.mean(differences):+.1f} [{interval[0]:+.1f}, {interval[1]:+.1f}])"
        if interval
        else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--assets", required=True, help="folder with pacs, students and teachers")
    parser.add_argument("--style", default="sketch", help="domain that no run sees")
    parser.add_argument("--out", default="lgd")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="time after which no run is started"
    )
    arguments = parser.parse_args()
    wanted = [(variant, seed) for seed in arguments.seeds for variant in VARIANTS]
    run = functools.partial(run_cell, arguments)
    path = Path(arguments.out) / "cells.jsonl"
    cells, count = finished(path, ("variant", "seed"), wanted, run, arguments.minutes)
    print(
        f"{count} of {len(wanted)} runs are finished; in brackets lgd's lead and its 95 % interval.\n"
    )
    columns = [f"{measure} {suite}" for measure in MEASURES for suite in ("ID", "OOD")]
    print(
        "| | "
        + " | ".join(c.replace(c.split()[0], MEASURES[c.split()[0]], 1) for c in columns)
        + " |"
    )
    print("|---|" + "---|" * len(columns))
    for variant in VARIANTS:
        print(
            f"| {variant} | "
            + " | ".join(entry(cells, variant, column) for column in columns)
            + " |"
        )


if __name__ == "__main__":
    main()
