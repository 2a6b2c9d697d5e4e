"""Train the toy student's pretrained weights, shipped in `edgekd.data.toy.student`.

    python scripts/make_toy_student.py --out src/edgekd/data/toy/student

They correspond to ImageNet weights, which are trained on photos but not on the user's domains. The network is trained
only on *photo-style* toy images, to predict class, colour and background. Colours and backgrounds do not depend on the
class (`world=True`), and no student's suite uses the same keys. There are no paintings, cartoons or sketches.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edgekd.core.files import replacing, write_json
from edgekd.data import toy
from edgekd.distill.inputs.views import ViewPolicy, render, view_params
from edgekd.distill.train import schedule

NAME = "mobilenetv3_large_100"
SIZE = 48
# No hue jitter and no greyscale, since the colour is one of the targets.
POLICY = ViewPolicy(min_area=0.5, hue=0.0, grey=0.0, saturation=0.2)


def _draw(job: tuple[str, int]) -> np.ndarray:
    return np.asarray(toy.draw(job[0], "photo", job[1], world=True))


def photos(seed: int, per_class: int) -> tuple[Tensor, Tensor]:
    """Return photo-style world images, uint8 `[N, H, W, 3]`, and their class, main colour and scene, int64 `[N, 3]`."""
    colours, scenes = list(toy.COLOURS), list(toy.SCENES)
    jobs, labels = [], []
    for kind, cls in enumerate(toy.CLASSES):
        for number in range(per_class):
            image_seed = toy.image_seed(toy.image_key(seed, "photo", cls, number, world=True))
            shown = toy.look(cls, image_seed, world=True)
            jobs.append((cls, image_seed))
            labels.append((kind, colours.index(shown.main), scenes.index(shown.scene)))
    with ProcessPoolExecutor() as workers:
        pixels = np.stack(list(workers.map(_draw, jobs, chunksize=64)))
    return torch.from_numpy(pixels), torch.tensor(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--per-class", type=int, default=500)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=101)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    pixels, labels = photos(arguments.seed, arguments.per_class)
    test_pixels, test_labels = photos(arguments.seed + 1, 30)
    keys = [str(i) for i in range(len(pixels))]

    backbone = timm.create_model(NAME, num_classes=0)
    head = nn.Linear(backbone.head_hidden_size, 30)
    model = nn.Sequential(backbone, head).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.lr, weight_decay=0.05, fused=True
    )
    ema = ModelEmaV3(model, decay=0.995, use_warmup=True)
    mean, std = (
        torch.tensor(backbone.pretrained_cfg[name])[:, None, None] for name in ("mean", "std")
    )
    started = time.perf_counter()
    for step in range(arguments.steps):
        chosen = torch.randint(0, len(pixels), (arguments.batch,))
        params = view_params([keys[i] for i in chosen], [step] * len(chosen), POLICY)
        views = (render(pixels[chosen], params, SIZE) - mean) / std
        logits = model.train()(views).unflatten(1, (3, 10))  # [B, 3, 10]
        loss = cross_entropy(logits.transpose(1, 2), labels[chosen])
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * schedule(step / arguments.steps, 0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model, step=step)
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}: loss {float(loss.detach()):.3f}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )

    whole = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]]).expand(len(test_pixels), -1, -1)
    plain = (whole, torch.eye(3).expand(len(test_pixels), -1, -1), torch.zeros(len(test_pixels)))
    from edgekd.distill.inputs.views import ViewParams

    with torch.inference_mode():
        test_views = (render(test_pixels, ViewParams(*plain), SIZE) - mean) / std
        right = ema.module.eval()(test_views).unflatten(1, (3, 10)).argmax(-1) == test_labels
    accuracy = dict(
        zip(
            ("kind", "colour", "scene"),
            (100 * right.float().mean(0)).round(decimals=1).tolist(),
            strict=True,
        )
    )
    print("accuracy on fresh photos, per cent:", accuracy)
    # Store convolutions in half precision to halve the file size; statistics and biases stay in float32.
    state = {
        name: value.half() if value.ndim > 1 else value
        for name, value in ema.module[0].state_dict().items()
    }
    with replacing(arguments.out / f"{NAME}.safetensors") as scratch:
        save_file({name: value.contiguous() for name, value in state.items()}, scratch)
    write_json(
        arguments.out / "made.json",
        {
            "what": "the toy student's first weights, trained by scripts/make_toy_student.py on photo-style images",
            "suite": toy.VERSION,
            "images": len(pixels),
            "steps": arguments.steps,
            "batch": arguments.batch,
            "size": SIZE,
            "seed": arguments.seed,
            "fresh_photo_percent": accuracy,
            "versions": {"torch": torch.__version__.split("+")[0], "timm": timm.__version__},
        },
    )


if __name__ == "__main__":
    main()
