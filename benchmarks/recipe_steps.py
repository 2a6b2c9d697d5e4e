"""Measure the processor time of a training step of each recipe, relative to `vl2v-adip`.

    python benchmarks/recipe_steps.py --rounds 5

A step includes everything after loading images and teacher embeddings: forward pass, loss terms, backward pass,
optimizer, moving average, and the prototypes of `lgd`. The stages of all recipes run a step in turn, `--rounds` times.
A recipe's time is the mean of its stages weighted by their shares, and ratios are taken within a round. Processor time
of one thread is measured, so that other programs have little effect.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from timm.optim import param_groups_weight_decay
from torch.nn.functional import normalize

from edgekd.distill.averaging import Ema
from edgekd.distill.classification.task import make_batch
from edgekd.distill.classification.text_targets import VisualBank
from edgekd.distill.launch import keep_freed_memory
from edgekd.distill.losses import objective
from edgekd.distill.models.batchnorm import find_folds, folded
from edgekd.distill.models.students import make_student
from edgekd.distill.recipes import RECIPES, Recipe, Stage
from edgekd.distill.text_bank import TextBank

NAME, DIM, BASE = "tf_efficientnet_lite0", 512, "vl2v-adip"


def make_step(
    recipe: Recipe, stage: Stage, size: int, batch: int, classes: int
) -> Callable[[], None]:
    """Return a training step of `stage` for a new student on one batch of noise."""
    torch.manual_seed(0)
    student = make_student(
        NAME,
        pretrained="scratch",
        size=size,
        dim=DIM if recipe.head != "linear" else None,
        classes=classes if recipe.head != "text" else None,
        projector=recipe.projector,
    )
    parts = (
        ("backbone", student.backbone),
        ("projector", student.neck),
        ("projector", student.projector),
    )
    for name, part in (*parts, ("head", student.head)):
        if part is not None:
            part.requires_grad_(name in stage.trains)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(student, 0.05), lr=1e-4, fused=True)
    student.train().to(memory_format=torch.channels_last)
    for module in student.modules():  # as in the loop: BatchNorm statistics are frozen
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    folds = find_folds(student, torch.rand(2, 3, size, size))
    average = Ema(student, 0.99)
    views = torch.rand(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (batch,))
    texts = normalize(torch.randn(classes, DIM), dim=-1)
    teacher = normalize(
        texts[labels] + 0.02 * torch.randn(batch, DIM), dim=-1
    )  # classifies as labelled
    bank = TextBank(tuple(map(str, range(classes))), ("{}",), texts, "noise", 100.0)
    visual = VisualBank(texts) if "visual_bank" in recipe.needs else None
    domains = (
        normalize(torch.randn(3, classes, DIM), dim=-1) if "domain_bank" in recipe.needs else None
    )

    def step() -> None:
        fields = {"visual_bank": visual.vectors.clone()} if visual else {}
        fields |= {"domain_bank": domains} if domains is not None else {}
        with folded(folds):
            made = make_batch(student, student(views), labels, teacher, bank, fields)
        loss, _ = objective(made, stage.terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(student, 1)
        if visual:
            visual.update(teacher)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--classes", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    # vl2v-sd trains the teacher's encoder, another network, so its time is not comparable.
    recipes = [recipe for recipe in RECIPES.values() if recipe.student == "any"]
    steps = {
        (recipe.name, stage.name): make_step(
            recipe, stage, arguments.size, arguments.batch, arguments.classes
        )
        for recipe in recipes
        for stage in recipe.stages
    }
    rounds = []
    for number in range(arguments.rounds + 1):
        took = {}
        for name, step in steps.items():
            started = time.process_time()
            step()
            took[name] = 1000 * (time.process_time() - started)
        if number:  # the first round is a warm-up
            rounds.append(took)
    totals = [
        {r.name: sum(s.share * took[r.name, s.name] for s in r.stages) for r in recipes}
        for took in rounds
    ]
    print(
        f"{NAME}, {arguments.size} px, batch {arguments.batch}, {arguments.classes} classes, medians of {len(rounds)}\n"
    )
    print(f"| recipe | stages, ms | step, ms | / {BASE} | / its distill stage |")
    print("|---|---|---|---|---|")
    for recipe in recipes:
        stages = ", ".join(
            f"{stage.name} {statistics.median(took[recipe.name, stage.name] for took in rounds):.0f}"
            for stage in recipe.stages
        )
        whole = statistics.median(total[recipe.name] for total in totals)
        ratio = statistics.median(total[recipe.name] / total[BASE] for total in totals)
        against = [
            total[recipe.name] / took[BASE, "distill"]
            for total, took in zip(totals, rounds, strict=True)
        ]
        print(
            f"| `{recipe.name}` | {stages} | {whole:.0f} | {ratio:.2f} | {statistics.median(against):.2f} |"
        )


if __name__ == "__main__":
    main()
