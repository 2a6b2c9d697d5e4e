"""A test kit in an artifact's folder: real pictures, their pixels, the expected logits, and programs that compare.

It shows app developers whether their app preprocesses and runs the file correctly.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.core.errors import EdgekdError
from edgekd.core.files import disk_errors, render_template, write_bytes, write_json, write_text
from edgekd.core.manifest import Artifact, read_artifact
from edgekd.data.images import decode
from edgekd.export.parity import runner
from edgekd.targets.feed import resizes

FOLDER = "kit"
PICTURES = 8
ENDINGS = {
    ".py.txt": "classify.py",
    ".cpp": "classify.cpp",
    ".cmake": "CMakeLists.txt",
    ".kt": "classify.kt",
    ".swift": "classify.swift",
}
"""Ending of a program in programs/, named by its format → its name in a kit."""
SHARE = {"fp32": 0.002, "fp16": 0.01}
"""Tolerance on a logit, as a share of the range of all of them."""
SHARE_OF_8_BITS = 0.1
"""The same for 8-bit files, since kernels of other processors round differently."""


def write_kit(artifact: Path, pictures: Sequence[bytes]) -> Path:
    """Write `kit/` into an artifact's folder, with what its runtime, or its target's evaluator, computes; return it.

    Args:
        pictures: encoded images.

    Raises:
        EdgekdError: there are no pictures, the file takes floats or ends in an embedding, or its runtime is missing.
    """
    if not pictures:
        raise EdgekdError("The run has no test images for a test kit.", "Leave out --test-kit.")
    manifest = read_artifact(artifact)
    if manifest.bank is not None or manifest.input == "float":
        raise EdgekdError(
            "A test kit is for files that take pixels and end in classes.", "Leave out --test-kit."
        )
    run, run_by = runner(artifact, manifest, threads=1)
    rule = manifest.preprocess
    inside = resizes(manifest.inputs[0].model_dump())
    images = [decode(picture) for picture in pictures]
    fed = [np.asarray(image) if inside else rule.pixels(image) for image in images]
    logits = np.concatenate([run(pixels[None]) for pixels in fed])  # [N, C]
    formats = (Image.open(io.BytesIO(picture)).format or "png" for picture in pictures)
    names = [f"{number}.{form.lower()}" for number, form in enumerate(formats)]
    facts = _facts(manifest, names, logits) | {"resizes": inside, "expected_from": run_by}
    folder = artifact / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with disk_errors(folder):
            folder.mkdir()
            for name, picture in zip(names, pictures, strict=True):
                write_bytes(folder / name, picture)
            for number, pixels in enumerate(fed):
                write_bytes(folder / f"{number}.ppm", _ppm(pixels))
            write_bytes(folder / "logits.bin", logits.astype("<f4").tobytes())
            write_json(folder / "kit.json", facts)
            programs = _copy_programs(manifest.format, folder)
            write_text(folder / "INTEGRATE.md", _guide(facts, programs, manifest.format))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # half a kit would be taken for a whole one
        raise
    return folder


def _ppm(pixels: NDArray[np.uint8]) -> bytes:
    """Return uint8 `[H, W, 3]` as a binary PPM file: a header of one line, then the bytes as they are."""
    height, width = pixels.shape[:2]
    return f"P6 {width} {height} 255\n".encode() + np.ascontiguousarray(pixels).tobytes()


def _facts(artifact: Artifact, names: Sequence[str], logits: NDArray[np.float32]) -> dict[str, Any]:
    """Return the content of kit.json."""
    share = SHARE.get(artifact.precision, SHARE_OF_8_BITS)
    return {
        "model": next(iter(artifact.files)),
        "pictures": list(names),
        "classes": list(artifact.classes),
        "preprocess": artifact.preprocess.model_dump(mode="json"),
        "tolerance": share * (float(np.ptp(logits)) or 1.0),
    }


def _copy_programs(format: str, folder: Path) -> list[str]:
    """Copy the programs of a format; return the names they have in the kit."""
    found = []
    for ending, name in ENDINGS.items():
        program = files(__package__) / "programs" / f"{format}{ending}"
        if program.is_file():
            write_bytes(folder / name, program.read_bytes())
            found.append(name)
    return found


def _guide(facts: dict[str, Any], programs: Sequence[str], format: str) -> str:
    """Return INTEGRATE.md."""
    rule, steps = facts["preprocess"], files(__package__) / "programs" / f"{format}.steps.txt"
    own = steps.read_text(encoding="utf-8").format(size=rule["size"]) if steps.is_file() else ""
    name, own_steps = "programs/INTEGRATE.md.jinja", own.splitlines()
    return render_template(
        __package__, name, **facts, rule=rule, programs=programs, own_steps=own_steps
    )
