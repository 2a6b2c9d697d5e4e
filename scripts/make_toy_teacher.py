"""Train the toy teacher, a small open_clip model of the toy data, shipped in `edgekd.data.toy.teacher`.

    python scripts/make_toy_teacher.py --out src/edgekd/data/toy/teacher

The images are drawn in all four domains with `world=True` (colours and backgrounds do not depend on the class), from
keys that no student's suite uses. Captions contain the class, mostly the style, and sometimes the colour and the scene.
The loss is CLIP's, except that all captions of the batch that are true of an image are its positives. For example, two
images of red cars are not negatives of each other's captions.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate, log_softmax, normalize

from edgekd.core.files import replacing, write_json
from edgekd.data import toy

IMAGE = 48
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {
            "timm_model_name": "test_resnet",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": IMAGE,
        },
        "text_cfg": {
            "context_length": 24,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    },
    "preprocess_cfg": {
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}
# Templates under `None` are true of every style. They include CLIP's seven-template ensemble.
TEMPLATES: dict[str | None, tuple[str, ...]] = {
    None: (
        "{}",
        "a {}",
        "the {}",
        "a picture of a {}",
        "an image of a {}",
        "itap of a {}.",
        "a bad image of the {}",
    ),
    "photo": (
        "a photo of a {}",
        "a photo of a {}.",
        "a photo of the {}.",
        "a bad photo of the {}.",
        "a photograph of a {}",
    ),
    "painting": (
        "a painting of a {}",
        "a painting of a {}.",
        "art of the {}.",
        "an oil painting of a {}",
    ),
    "cartoon": (
        "a cartoon of a {}",
        "a cartoon {}.",
        "a {} in a video game.",
        "a comic drawing of a {}",
    ),
    "sketch": (
        "a sketch of a {}",
        "a sketch of a {}.",
        "a pencil drawing of a {}",
        "a {} drawn in pencil",
    ),
}


@dataclass(frozen=True)
class Fact:
    """Content of an image or of a caption; None where it is not shown or not mentioned."""

    cls: str
    domain: str | None
    main: str | None
    scene: str | None

    def caption(self, template: str) -> str:
        words = f"{self.main} {self.cls}" if self.main else self.cls
        place = f" against {self.scene}" if self.scene else ""
        return (
            template.format(words).replace("a orange", "an orange").rstrip(".")
            + place
            + "." * template.endswith(".")
        )


def caption_of(fact: Fact, rng: random.Random) -> tuple[Fact, str]:
    """Return a true caption of an image: its facts and its text."""
    claim = Fact(
        fact.cls,
        fact.domain if rng.random() < 0.3 else None,
        fact.main if rng.random() < 0.05 else None,
        fact.scene if rng.random() < 0.05 else None,
    )
    return claim, claim.caption(rng.choice(TEMPLATES[claim.domain]))


def _draw(args: tuple[str, str, int, bool]) -> np.ndarray:
    cls, domain, seed, world = args
    return np.asarray(toy.draw(cls, domain, seed, world=world))


def draw_pool(seed: int, per_class: int, *, world: bool) -> tuple[Tensor, list[Fact]]:
    """Return all images of a suite, uint8 `[N, 3, H, W]`, and their facts. Sketches have no colour and no scene."""
    jobs, facts = [], []
    for domain in toy.DOMAINS:
        for cls in toy.CLASSES:
            for number in range(per_class):
                image_seed = toy.image_seed(toy.image_key(seed, domain, cls, number, world=world))
                jobs.append((cls, domain, image_seed, world))
                shown = toy.look(cls, image_seed, world=world)
                plain = domain == "sketch"
                facts.append(
                    Fact(cls, domain, None if plain else shown.main, None if plain else shown.scene)
                )
    with ProcessPoolExecutor() as workers:
        pixels = np.stack(list(workers.map(_draw, jobs, chunksize=64)))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), facts


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Crop the batch to one random square and mirror half of it: uint8 → normalised float32 `[B, 3, 48, 48]`."""
    side = images.shape[-1]
    crop = int(torch.randint(round(side * 0.75), side + 1, (), generator=rng))
    top, left = (int(torch.randint(0, side - crop + 1, (), generator=rng)) for _ in range(2))
    pixels = images[:, :, top : top + crop, left : left + crop].float() / 255
    pixels = interpolate(
        pixels, size=(IMAGE, IMAGE), mode="bilinear", align_corners=False, antialias=True
    )
    mirrored = torch.rand(len(pixels), 1, 1, 1, generator=rng) < 0.5
    pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    gain = 1 + 0.3 * (torch.rand(len(pixels), 1, 1, 1, generator=rng) - 0.5)
    return normalised(pixels * gain)


def normalised(pixels: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def truth(facts: list[Fact], claims: list[Fact]) -> Tensor:
    """Return whether each caption is true of each image, bool `[images, captions]`."""

    def agree(field: str) -> Tensor:
        names: dict[str | None, int] = {None: 0}
        named = torch.tensor(
            [names.setdefault(getattr(claim, field), len(names)) for claim in claims]
        )
        shown = torch.tensor([names.setdefault(getattr(fact, field), len(names)) for fact in facts])
        return (named[None, :] == shown[:, None]) | (named[None, :] == 0)

    return agree("cls") & agree("domain") & agree("main") & agree("scene")


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """Return CLIP's symmetric cross-entropy, with equal targets for all true pairs of a row or column."""
    logits = scale * images @ texts.T  # [B, B]
    target = true.float()
    by_image = -(target / target.sum(1, keepdim=True) * log_softmax(logits, dim=1)).sum(1).mean()
    by_text = -(target / target.sum(0, keepdim=True) * log_softmax(logits, dim=0)).sum(0).mean()
    return (by_image + by_text) / 2


@torch.inference_mode()
def zero_shot(
    model: torch.nn.Module, tokenize: open_clip.SimpleTokenizer, pixels: Tensor, facts: list[Fact]
) -> dict[str, float]:
    """Return zero-shot top-1 in percent of the prompt "a photo of a {class}" in each domain."""
    bank = normalize(
        model.encode_text(tokenize([f"a photo of a {name}" for name in toy.CLASSES])), dim=-1
    )
    small = interpolate(
        pixels.float() / 255,
        size=(IMAGE, IMAGE),
        mode="bicubic",
        align_corners=False,
        antialias=True,
    )
    guesses = torch.cat(
        [
            (model.encode_image(part) @ bank.T).argmax(1)
            for part in normalised(small.clamp(0, 1)).split(256)
        ]
    )
    right = [
        toy.CLASSES[guess] == fact.cls for guess, fact in zip(guesses.tolist(), facts, strict=True)
    ]
    return {
        domain: round(
            100
            * float(
                np.mean(
                    [hit for hit, fact in zip(right, facts, strict=True) if fact.domain == domain]
                )
            ),
            1,
        )
        for domain in toy.DOMAINS
    }


def train(steps: int, batch: int, seed: int, pool: int, out: Path) -> None:
    torch.manual_seed(seed)
    rng, dice = torch.Generator().manual_seed(seed), random.Random(seed)
    started = time.perf_counter()
    pixels, facts = draw_pool(seed, pool, world=True)
    # A large seed, since the student's suites have small ones. This suite is only for testing.
    test_pixels, test_facts = draw_pool(10_000 + seed, 20, world=False)
    print(
        f"drew {len(pixels):,} + {len(test_pixels):,} images in {time.perf_counter() - started:.0f} s",
        flush=True,
    )

    with replacing(out / "open_clip_config.json") as scratch:
        scratch.write_text(json.dumps(CONFIG, indent=2) + "\n")
    model = open_clip.CLIP(**CONFIG["model_cfg"]).to(memory_format=torch.channels_last)
    tokenize = open_clip.get_tokenizer(f"local-dir:{out}")
    embedding = [model.token_embedding.weight]
    rest = [weight for weight in model.parameters() if weight is not embedding[0]]
    peak = 3e-3
    # No weight decay on token embeddings: most tokens never occur and would only decay.
    groups = [{"params": embedding, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    started = time.perf_counter()
    for step in range(steps):
        lr = peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        chosen = torch.randint(0, len(facts), (batch,), generator=rng)
        shown = [facts[i] for i in chosen.tolist()]
        claims, words = zip(*(caption_of(fact, dice) for fact in shown), strict=True)
        image = normalize(model.encode_image(augment(pixels[chosen], rng)), dim=-1)
        text = normalize(model.encode_text(tokenize(list(words))), dim=-1)
        loss = contrastive_loss(image, text, model.logit_scale.exp(), truth(shown, list(claims)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if (step + 1) % 200 == 0 or step + 1 == steps:
            model.eval()
            scores = zero_shot(model, tokenize, test_pixels, test_facts)
            model.train()
            seconds = time.perf_counter() - started
            print(f"step {step + 1}  loss {loss.item():.3f}  {seconds:.0f} s  {scores}", flush=True)

    weights = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    with replacing(out / "open_clip_model.safetensors") as scratch:
        save_file({name: value.contiguous() for name, value in weights.items()}, scratch)
    reloaded = open_clip.create_model_from_pretrained(
        f"local-dir:{out}", return_transform=False
    ).eval()
    scores = zero_shot(reloaded, tokenize, test_pixels, test_facts)
    print("zero-shot of the written file, fresh student-like images:", scores)
    write_json(
        out / "made.json",
        {
            "what": "edgekd's toy teacher: an open_clip model of the toy suite, trained by scripts/make_toy_teacher.py",
            "suite": toy.VERSION,
            "images": len(pixels),
            "steps": steps,
            "batch": batch,
            "seed": seed,
            "zero_shot_percent": scores,
            "zero_shot_prompt": "a photo of a {class}",
            "zero_shot_images_per_domain": 20 * len(toy.CLASSES),
            "versions": {
                "torch": torch.__version__.split("+")[0],
                "open_clip": open_clip.__version__,
            },
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("src/edgekd/data/toy/teacher"), help="folder of the model"
    )
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pool", type=int, default=200, help="images of each class in each domain")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.steps, args.batch, args.seed, args.pool, args.out)
