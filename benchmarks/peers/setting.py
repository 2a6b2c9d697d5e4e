"""Shared code of the training scripts in this folder: images, student, teacher, clock and evaluation.

Every program trains the same timm student from the same weights on the same files. The teacher is the image encoder of
a CLIP model with a zero-shot head. For programs that pass the student's tensor to the teacher, `Teacher` normalises and
enlarges it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import datasets, transforms

STUDENT, SIZE, BATCH = "tf_efficientnet_lite0", 96, 32
MEAN = STD = (0.5, 0.5, 0.5)
LR, DECAY, WARMUP, TEMPERATURE, LABEL_WEIGHT = 3e-4, 0.01, 0.1, 4.0, 0.5
"""Defaults of edgekd's recipe `kd`, used by every program that has these settings."""


def arguments() -> argparse.Namespace:
    """Parse the options of all training scripts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True, help="output of pictures.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--every", type=int, default=9, help="steps between snapshots")
    parser.add_argument("--recipe", default="kd", help="of edgekd")
    given = parser.parse_args()
    torch.manual_seed(0)
    given.out.mkdir(parents=True, exist_ok=True)
    return given


def make_student(assets: Path, classes: int) -> nn.Module:
    """Build the student with its ImageNet weights and a new classifier."""
    path = str(assets / "students" / f"{STUDENT}.safetensors")
    overlay = {"file": path, "mean": MEAN, "std": STD}
    return timm.create_model(
        STUDENT, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes
    )


class Teacher(nn.Module):
    """Zero-shot classifier on tensors that are normalised for the student, float32 `[B, 3, SIZE, SIZE]`."""

    def __init__(self, assets: Path, classes: list[str]) -> None:
        super().__init__()
        name = f"local-dir:{assets / 'teachers' / 'miniclip'}"
        clip = open_clip.create_model(name).eval()
        tokens = open_clip.get_tokenizer(name)([f"a photo of a {c}" for c in classes])
        with torch.no_grad():
            texts = functional.normalize(clip.encode_text(tokens), dim=-1)
        self.visual, self.side = clip.visual, clip.visual.image_size
        self.pretrained_cfg = {"mean": MEAN, "std": STD}  # timm: no other normalisation
        for name, value in (
            ("texts", clip.logit_scale.exp().detach() * texts),
            ("mean", torch.tensor(clip.visual.image_mean).view(1, 3, 1, 1)),
            ("std", torch.tensor(clip.visual.image_std).view(1, 3, 1, 1)),
        ):
            self.register_buffer(name, value)
        self.requires_grad_(False)

    def prepared(self, images: Tensor) -> Tensor:
        """Return the images with CLIP's size and normalisation."""
        side = self.side[0] if isinstance(self.side, tuple) else self.side
        images = (images * STD[0] + MEAN[0] - self.mean) / self.std
        return functional.interpolate(images, (side, side), mode="bicubic", antialias=True)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[B, C]`."""
        return functional.normalize(self.visual(self.prepared(images)), dim=-1) @ self.texts.T


class Clock:
    """Measures the processor time of a training, so that other load has little effect, and stores snapshots.

    Every program uses one torch thread and loads images in its own process. Time for snapshots is not included.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.snapshots = given, list[tuple[int, float, dict[str, Tensor]]]()
        self.started = self.last = time.process_time()
        self.first = self.images_per_second = 0.0
        """Images/s over all steps except the first."""

    def step(self, done: int) -> None:
        """Record the time after `done` steps."""
        self.last = time.process_time()
        self.first = self.first or self.last
        if done > 1:
            self.images_per_second = (done - 1) * BATCH / (self.last - self.first)

    def snapshot(self, done: int, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Store the weights after `done` steps, if they are due, without counting the time since that step."""
        if done % self.given.every and done != self.given.steps:
            return
        copied = {name: value.detach().clone() for name, value in state().items()}
        self.snapshots.append((done, self.last - self.started, copied))
        away = time.process_time() - self.last
        self.started += away
        self.first += away


def score(given: argparse.Namespace, model: nn.Module, part: str) -> float:
    """Return top-1 in percent over the images of a part, with timm's preprocessing for validation."""
    prepare = timm.data.create_transform(
        (3, SIZE, SIZE), mean=MEAN, std=STD, interpolation="bicubic", crop_pct=0.875
    )
    pictures = datasets.ImageFolder(given.pictures / part, prepare)
    loader = torch.utils.data.DataLoader(pictures, batch_size=64)
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
    return 100 * right / len(pictures)


def finish(
    given: argparse.Namespace,
    program: str,
    clock: Clock,
    accuracy: Callable[[Mapping[str, Tensor], str], float],
) -> None:
    """Evaluate every snapshot on `val`, the last one also on `test` and `unseen`, and write `result.json`."""
    result: dict[str, Any] = {"program": program, "images_per_second": clock.images_per_second}
    result["curve"] = [
        {"step": done, "seconds": seconds, "val": accuracy(state, "val")}
        for done, seconds, state in clock.snapshots
    ]
    _, _, last = clock.snapshots[-1]
    result |= {part: accuracy(last, part) for part in ("test", "unseen")}
    torch.save(last, given.out / "student.pt")
    (given.out / "result.json").write_text(json.dumps(result, indent=1))


def finish_timm(given: argparse.Namespace, program: str, clock: Clock, model: nn.Module) -> None:
    """Call `finish` for snapshots that are state dicts of a timm classifier."""

    def accuracy(state: Mapping[str, Tensor], part: str) -> float:
        model.load_state_dict(state)
        return score(given, model, part)

    finish(given, program, clock, accuracy)


def augmented(given: argparse.Namespace) -> datasets.ImageFolder:
    """Return the training images with torchvision's usual random crops and flips."""
    steps = [
        transforms.RandomResizedCrop(SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    return datasets.ImageFolder(given.pictures / "train", transforms.Compose(steps))
