"""Compare teacher embeddings as computed for the cache with open_clip in float32: images/s and smallest cosine.

    python benchmarks/teacher_speed.py --teacher ViT-B-32:random --batch 64 --rounds 4

Both use one thread and alternate in one process. Processor time is measured, so other load has little effect.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from edgekd.distill.models.teachers import ClipTeacher, has_bfloat16, load_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="ViT-B-32:random")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    teacher = load_teacher(given.teacher)
    assert isinstance(teacher, ClipTeacher)
    half = teacher.in_bfloat16()
    side = teacher.preprocess.size
    views = torch.rand(given.batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (teacher.preprocess.mean, teacher.preprocess.std)
    )

    @torch.inference_mode()
    def bare() -> Tensor:
        found: Tensor = teacher.model.encode_image((views - mean) / std)  # type: ignore[operator]
        return found

    ways: dict[str, Callable[[], Tensor]] = {
        "open_clip, float32": bare,
        "edgekd, float32": lambda: teacher.embed_images(views),
        "edgekd, bfloat16": lambda: half.embed_images(views),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    for round_ in range(given.rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            answers[name] = way()
            if round_:  # the first round includes start-up
                seconds[name].append(time.process_time() - started)
    base = min(seconds["open_clip, float32"])
    print(f"{given.teacher}, {given.batch} images a batch, bfloat16 in hardware: {has_bfloat16()}")
    for name, times in seconds.items():
        cosine = float(
            cosine_similarity(answers[name], answers["open_clip, float32"], dim=-1).min()
        )
        print(
            f"{name:20} {given.batch / min(times):6.1f} images/s  {base / min(times):.2f} of open_clip's  "
            f"smallest cosine {cosine:.5f}"
        )


if __name__ == "__main__":
    main()
