"""Leave-one-domain-out table: teacher zero-shot and every recipe, ID and OOD, over seeds; goes on where it stopped.

    python benchmarks/lodo_table.py --data PACS --teacher local-dir:FOLDER --student tf_efficientnet_lite0 \
        --student-weights FILE --size 96 --batch 32 --steps 200 --seeds 0 1 --out lodo

Same images, views, steps, batch and averaging for every recipe. Accuracy is on all images of the unseen domain, and on
the tenth of the source domains that neither trained nor selected. Selection: last averaged weights; nothing looks at
the unseen domain.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import edgekd
from edgekd.data import load_images
from edgekd.distill.load import load_run
from edgekd.distill.predict import predict_all, student_predict, teacher_predict
from edgekd.distill.prompts import templates_for
from edgekd.distill.teacher import ClipTeacher, load_teacher


def top1(scores: np.ndarray, labels: np.ndarray) -> float:
    """Per cent."""
    return 100 * float((scores.argmax(axis=1) == labels).mean())


def run_cell(arguments: argparse.Namespace, recipe: str, domain: str, seed: int) -> dict[str, Any]:
    """Train one student and test it."""
    folder = Path(arguments.out) / f"{recipe}-{domain}-{seed}"
    run = edgekd.train(
        arguments.student,
        data=arguments.data,
        teacher=arguments.teacher,
        recipe=recipe,
        test_domain=domain,
        seed=seed,
        student_weights=arguments.student_weights,
        pretrained=arguments.pretrained,
        size=arguments.size,
        batch_size=arguments.batch,
        steps=arguments.steps,
        out=folder,
        overwrite=True,
        settings=[
            *arguments.set,
            *(text.partition(":")[2] for text in arguments.recipe_set if text.startswith(recipe + ":")),
        ],
    )
    loaded = load_run(folder)
    images, split = loaded.data()
    predict = student_predict(loaded.student, loaded.vectors)
    found = {
        name: top1(predict_all(predict, images, part, run.preprocess), images.labels[part])
        for name, part in (("val", split.val), ("id", split.id_test), ("ood", split.ood_test))
    }
    if not arguments.keep:
        shutil.rmtree(folder)
    return {
        "recipe": recipe,
        "domain": domain,
        "seed": seed,
        **found,
        "seconds": run.train_seconds,
        "wait": run.data_wait_percent,
    }


def teacher_rows(arguments: argparse.Namespace, domains: list[str]) -> dict[str, float]:
    """Zero-shot accuracy on every domain, all images."""
    teacher = load_teacher(arguments.teacher)
    assert isinstance(teacher, ClipTeacher)
    images = load_images(arguments.data)
    bank = teacher.text_bank(images.classes, templates_for("photo"))
    found = {}
    for domain in domains:
        part = np.flatnonzero(images.domain_of == images.domains.index(domain))
        scores = predict_all(teacher_predict(teacher, bank), images, part, teacher.preprocess)
        found[domain] = top1(scores, images.labels[part])
    return found


def table(cells: list[dict[str, Any]], teacher: dict[str, float], domains: list[str], recipes: list[str]) -> list[str]:
    """Markdown: mean ± population standard error over seeds, as DomainBed defines it (EVALUATION E.1)."""

    def entry(values: list[float]) -> str:
        return f"{np.mean(values):.1f} ± {np.std(np.array(values) / np.sqrt(len(values))):.1f}" if values else "–"

    lines = [
        "| | ID avg | " + " | ".join(f"OOD {d}" for d in domains) + " | OOD avg | s per run |",
        "|---|---|" + "---|" * len(domains) + "---|---|",
        "| teacher zero-shot | – | "
        + " | ".join(f"{teacher[d]:.1f}" for d in domains)
        + f" | {np.mean([teacher[d] for d in domains]):.1f} | – |",
    ]
    for recipe in recipes:
        own = [cell for cell in cells if cell["recipe"] == recipe]
        seeds = sorted({cell["seed"] for cell in own})
        per_seed = {s: [c for c in own if c["seed"] == s] for s in seeds}
        complete = [rows for rows in per_seed.values() if {c["domain"] for c in rows} >= set(domains)]
        lines.append(
            f"| {recipe} | {entry([float(np.mean([c['id'] for c in rows])) for rows in complete])} | "
            + " | ".join(entry([c["ood"] for c in own if c["domain"] == d]) for d in domains)
            + f" | {entry([float(np.mean([c['ood'] for c in rows])) for rows in complete])} "
            + f"| {np.mean([c['seconds'] for c in own]) if own else 0:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="toy")
    parser.add_argument("--teacher", default="toy")
    parser.add_argument("--student", default="mobilenetv3")
    parser.add_argument("--student-weights", type=Path)
    parser.add_argument("--pretrained")
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--recipes", nargs="+", default=["erm", "kd", "vl2v-adip"])
    parser.add_argument("--domains", nargs="+")
    parser.add_argument("--set", action="append", default=[], help="setting for every recipe, as edgekd train --set")
    parser.add_argument("--recipe-set", action="append", default=[], help="RECIPE:name=value, for one recipe")
    parser.add_argument("--out", default="lodo")
    parser.add_argument("--keep", action="store_true", help="keep the run folders")
    arguments = parser.parse_args()
    domains = arguments.domains or list(load_images(arguments.data).domains)
    path = Path(arguments.out) / "cells.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for seed in arguments.seeds:
        for domain in domains:
            for recipe in arguments.recipes:
                if not any((c["recipe"], c["domain"], c["seed"]) == (recipe, domain, seed) for c in cells):
                    cells.append(run_cell(arguments, recipe, domain, seed))
                    with open(path, "a", encoding="utf-8") as handle:
                        handle.write(json.dumps(cells[-1]) + "\n")
                    print(cells[-1], flush=True)
    lines = table(cells, teacher_rows(arguments, domains), domains, arguments.recipes)
    print("\n".join(lines))
    print(f"{len(arguments.seeds)} seeds, {os.cpu_count()} cores, {platform.processor() or platform.machine()}")


if __name__ == "__main__":
    main()
