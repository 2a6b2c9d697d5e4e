"""Compare training from WebDataset shards with training from the same images in folders: images/s and memory.

    python benchmarks/shard_speed.py [--images 2000] [--steps 40] [--rounds 3] [--memory 1000,10000,100000]

The images are synthetic JPEGs. Each measurement is a separate process. Folder and shards alternate within a round, and
the median of the ratios is printed. `stored` reads pixels decoded by the first run, as for data sets of up to 8 GiB of
pixels. `on the fly` decodes every image at every visit, as for larger ones. The teacher's cache is filled beforehand.
`--memory` prints the memory not backed by a file after training on the given numbers of tiny images in shards.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog")
SHARD = 1000


def jpeg(number: int, side: int) -> bytes:
    """Return a smooth image, different for each number."""
    small = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def write(root: Path, images: int, side: int, *, folder: bool) -> str:
    """Write the images in shards, and with `folder` as files too; return the pattern of the shards."""
    (root / "shards").mkdir(parents=True)
    for first in range(0, images, SHARD):
        with tarfile.open(root / "shards" / f"{first // SHARD:03d}.tar", "w") as tar:
            for number in range(first, min(first + SHARD, images)):
                data, name = jpeg(number, side), CLASSES[number % 2]
                for ending, content in ((".jpg", data), (".txt", name.encode())):
                    member = tarfile.TarInfo(f"{number:06d}{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                if folder:
                    path = root / "folder" / name / f"{number:06d}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
    return f"{root}/shards/{{000..{(images - 1) // SHARD:03d}}}.tar"


def train(settings: dict[str, object], *, stored: bool) -> None:
    """Train in this process and print its speed and memory."""
    import edgekd
    from edgekd.distill.inputs import batches

    if not stored:
        batches.open_store.__kwdefaults__["max_bytes"] = 0
    run = edgekd.train(**settings)
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    memory = int(found[1]) / 1000 if found else float("nan")
    print(json.dumps({"images_per_s": run.images_per_second, "anonymous_mb": memory}))


def child(cache: Path, settings: dict[str, object], *, stored: bool = True) -> dict[str, float]:
    """Train in a separate process."""
    with tempfile.TemporaryDirectory() as out:
        words = json.dumps([settings | {"out": f"{out}/run"}, stored])
        done = subprocess.run(
            [sys.executable, __file__, "--child", words],
            env=os.environ | {"EDGEKD_CACHE": str(cache)}, stdout=subprocess.PIPE, check=True, text=True,
        )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=160)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        settings, stored = json.loads(given.child)
        return train(settings, stored=stored)
    shared = {"pretrained": "scratch", "accelerator": "cpu", "test_domain": "none"}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pattern = write(root, given.images, given.side, folder=True)
        sources = {"folder": str(root / "folder"), "shards": pattern}
        for name, stored in (("stored", True), ("on the fly", False)):
            ratios, rates = [], []
            for number in range(given.rounds + 1):
                speeds = {}
                for source in list(sources)[:: 1 if number % 2 else -1]:
                    settings = shared | {
                        "student": "mobilenetv3", "size": 64, "recipe": "kd", "teacher": "toy", "views": 1,
                        "batch_size": 32, "steps": given.steps, "data": sources[source],
                    }  # fmt: skip
                    speeds[source] = child(root / "cache", settings, stored=stored)["images_per_s"]
                if number:  # the first round fills the caches
                    ratios.append(speeds["shards"] / speeds["folder"])
                    rates.append(speeds["folder"])
            ratio = statistics.median(ratios)
            print(
                f"{name:<12} folder {statistics.median(rates):7.1f} images/s, shards {ratio:.3f} of it"
            )
        for images in map(int, filter(None, given.memory.split(","))):
            pattern = write(root / str(images), images, 16, folder=False)
            settings = shared | {
                "student": "test_efficientnet", "size": 16, "recipe": "erm", "batch_size": 16,
                "steps": 20, "data": pattern,
            }  # fmt: skip
            for _ in range(2):  # the first run lists and decodes
                memory = child(root / "cache", settings)["anonymous_mb"]
                print(f"{images:>8,} images in shards: {memory:7.1f} MB anonymous", flush=True)


if __name__ == "__main__":
    main()
