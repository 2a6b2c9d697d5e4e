"""Compare training speeds: bare timm step, distil step, whole loop from JPEGs, and an online teacher.

    python benchmarks/train_speed.py --data FOLDER_OF_JPEGS [--rounds 3] [--steps 20]

All alternate in one process, `--rounds` times. Ratios are taken within a round and their median is printed, so that
drifting machine speed has little effect. Targets: distil step ≥ 0.95 of the bare step, whole loop ≥ 0.8 of it, cached
loop ≥ 5 × the loop with an online ViT-B/32 with random weights. BatchNorm statistics are frozen in the distil step and
the loops, as for every pretrained student. The bare step uses timm's `.train()`, and is repeated with them frozen.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from timm.utils import ModelEmaV3

from edgekd.configs.train import TrainConfig
from edgekd.distill.classification.task import make_batch
from edgekd.distill.losses import objective
from edgekd.distill.models.batchnorm import find_folds, folded
from edgekd.distill.models.students import make_student
from edgekd.distill.recipes import get_recipe
from edgekd.distill.text_bank import TextBank
from edgekd.distill.train import train

NAME, CLASSES, DIM = "mobilenetv3_large_100", 7, 512
ADIP = {
    "recipe": "vl2v-adip",
    "stages": {"align": {"share": 0}, "distill": {"share": 1}},
}


def images_per_second(step: object, batch: int, steps: int) -> float:
    """Return the speed over `steps` calls, after two warm-up calls."""
    for _ in range(2):
        step()  # type: ignore[operator]
    started = time.perf_counter()
    for _ in range(steps):
        step()  # type: ignore[operator]
    return batch * steps / (time.perf_counter() - started)


def freeze_statistics(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def bare_step(views: torch.Tensor, labels: torch.Tensor, *, frozen: bool = False) -> object:
    """Return a training step with a timm model, cross-entropy, backward pass and fused AdamW."""
    model = (
        timm.create_model(NAME, num_classes=CLASSES).train().to(memory_format=torch.channels_last)
    )
    if frozen:
        freeze_statistics(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(views), labels).backward()
        optimizer.step()

    return step


def distil_step(views: torch.Tensor, labels: torch.Tensor) -> object:
    """Return a step of vl2v-adip's distill stage on a batch in memory: forward, terms, backward, optimizer, EMA."""
    stage = get_recipe("vl2v-adip").stages[-1]
    student = make_student(NAME, pretrained="scratch", size=views.shape[-1], dim=DIM).train()
    freeze_statistics(student)
    assert student.projector is not None
    student.projector.requires_grad_(False)
    student.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad], lr=1e-4, fused=True
    )
    ema = ModelEmaV3(student, decay=0.99, use_warmup=True)
    vectors = torch.nn.functional.normalize(torch.randn(CLASSES, DIM), dim=-1)
    bank = TextBank(tuple("abcdefg"), ("{}",), vectors, "random", 100.0)
    teacher = torch.randn(len(labels), DIM)
    folds = find_folds(student, views[:2])
    freeze_statistics(student)

    def step() -> None:
        with folded(folds):
            batch = make_batch(student, student(views), labels, teacher, bank)
        loss, _ = objective(batch, stage.terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(student, step=1)

    return step


def loop(
    data: str, batch: int, size: int, steps: int, out: Path, **options: object
) -> tuple[float, float]:
    """Return images/s and data_wait % of the loop of `edgekd train`, only in the distill stage without `recipe`."""
    config = TrainConfig.load(
        **{
            "student": NAME,
            "pretrained": "scratch",
            "data": data,
            "batch_size": batch,
            "size": size,
            "steps": steps + 1,
            "out": out,
            "overwrite": True,
            **({} if "recipe" in options else ADIP),
            "views": 1,
            "bn": "frozen",
            "precision": "32-true",  # as the bare step
            **options,
        }
    )
    run = train(config)
    return run.images_per_second, run.data_wait_percent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--teacher", default="toy", help="teacher of the cached loop; its passes are not timed"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    batch, size, steps = arguments.batch, arguments.size, arguments.steps
    torch.manual_seed(0)
    views = torch.rand(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (batch,))
    rates: dict[str, list[float]] = {
        name: [] for name in ("bare", "frozen", "distil", "loop", "restyled", "auto", "online")
    }
    waits: dict[str, list[float]] = {"loop": [], "restyled": []}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        for options in ({}, {"recipe": "edgekd"}):  # fills the caches
            loop(arguments.data, batch, size, 2, out, teacher=arguments.teacher, **options)
        for _ in range(arguments.rounds):
            rates["bare"].append(images_per_second(bare_step(views, labels), batch, steps))
            rates["frozen"].append(
                images_per_second(bare_step(views, labels, frozen=True), batch, steps)
            )
            rates["distil"].append(images_per_second(distil_step(views, labels), batch, steps))
            for name, options in (("loop", {}), ("restyled", {"recipe": "edgekd"})):
                rate, wait = loop(
                    arguments.data, batch, size, steps, out, teacher=arguments.teacher, **options
                )
                rates[name].append(rate)
                waits[name].append(wait)
            rates["auto"].append(
                loop(
                    arguments.data, batch, size, steps, out,
                    teacher=arguments.teacher, precision="auto",
                )[0]
            )  # fmt: skip
            online = {"teacher": "ViT-B-32:random", "online_teacher": True}
            rates["online"].append(
                loop(arguments.data, batch, size, max(3, steps // 4), out, **online)[0]
            )
    print(
        f"{NAME}, {size} px, batch {batch}, {os.cpu_count()} cores, torch {torch.__version__}, {platform.machine()}"
    )
    print("| what | images/s (median of rounds) | ratio (median of rounds) | target |")
    print("|---|---|---|---|")
    rows = (
        ("bare timm step", "bare", "bare", ""),
        ("bare timm step, BatchNorm frozen / bare", "frozen", "bare", ""),
        ("distil step / bare", "distil", "bare", "≥ 0.95"),
        ("distil step / bare with BatchNorm frozen", "distil", "frozen", ""),
        ("whole loop from JPEGs / bare", "loop", "bare", "≥ 0.8"),
        (
            "whole loop of the default recipe, half of the views restyled / whole loop",
            "restyled",
            "loop",
            "≥ 0.87",
        ),
        ("whole loop with --precision auto / bare", "auto", "bare", ""),
        ("cached loop / online ViT-B/32", "loop", "online", "≥ 5"),
    )
    for title, name, base, target in rows:
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates[base], strict=True))
        print(f"| {title} | {statistics.median(rates[name]):.1f} | {ratio:.2f} | {target} |")
    for name, seen in waits.items():
        print(f"data_wait, {name}: {statistics.median(seen):.1f} %")


if __name__ == "__main__":
    main()
