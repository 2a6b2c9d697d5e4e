"""The class vectors beside an artifact that ends in an embedding: numpy alone, here and on a device.

Such a file gives `ê`, the image's unit vector in the teacher's space; its logits are `logit_scale · ê · V`, one product
with the class vectors `V`. They lie in an npz file of their own, so that a class is added without touching the model.

Where the teacher's embeddings are anisotropic, the student was trained in their mean-centred space, images and texts
each with their own mean (`text_mean`). `V` is in the student's space already; `of_text` brings later vectors there.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.core.errors import EdgekdError
from edgekd.core.readers import parse_json, plain_name, printable, printable_values, read_arrays

BANK_FILE = "bank.npz"
"""The sidecar as it is exported; after a change `bank-<8 hex digits of its hash>.npz`."""
FORMAT = 1
"""Of the file; raised when its arrays change their meaning."""


@dataclass(frozen=True, eq=False)
class ClassBank:
    """What turns embeddings into logits."""

    classes: tuple[str, ...]
    vectors: NDArray[np.float32]
    """`[C, D]`, rows of length 1, in the student's space."""
    logit_scale: float
    """Factor on cosines; fitted on source validation, so that the softmax is calibrated for the exported classes."""
    text_mean: NDArray[np.float32] | None
    """`[D]`, what is taken off a teacher's text vector of length 1; None: the student's space is the teacher's."""
    facts: Mapping[str, Any]
    """JSON values: `teacher`, `teacher_id`, `templates`, `described`, and `added`, later classes and their origin."""

    def logits(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits float32 `[B, C]` of unit vectors float32 `[B, D]`.

        Not by BLAS, whose sums depend on how many classes there are: here a class that is added leaves the logits of
        the others as they are, bit for bit.
        """
        cosines = np.einsum("bd,cd->bc", np.ascontiguousarray(embeddings), self.vectors)
        scaled: NDArray[np.float32] = cosines * np.float32(self.logit_scale)
        return scaled

    def of_text(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Return the class vector `[D]` of the teacher's vectors of prompts about it, `[D]` or `[P, D]`.

        Each to length 1, averaged, to length 1, as CLIP does; then less `text_mean`, where there is one, and to length
        1 again. Another width, and numbers without a direction, are an `EdgekdError`.
        """
        found = unit(unit(self._checked(np.atleast_2d(vectors))).mean(axis=0))
        return unit(found - self.text_mean) if self.text_mean is not None else found

    def of_images(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the class vector `[D]` of images of it, unit vectors `[N, D]`: their mean, at length 1 (prototype)."""
        return unit(unit(self._checked(embeddings)).mean(axis=0))

    def with_class(
        self, name: str, vector: NDArray[np.float32], how: Mapping[str, Any]
    ) -> ClassBank:
        """Return this bank with one more class; `how` it was made, JSON values, is kept under `added`.

        An empty name, one that is there already, and a vector of another width are an `EdgekdError`.
        """
        name = name.strip()
        if not name or "\n" in name or "\0" in name:
            raise EdgekdError("A class needs a name, on one line.", 'For example: "fire hydrant".')
        if plain_name(name) in {plain_name(known) for known in self.classes}:
            raise EdgekdError(
                f'The artifact has the class "{name}" already.',
                "Give another name; a class that was added can be taken out first: edgekd classes remove.",
            )
        vectors = np.concatenate([self.vectors, unit(self._checked(vector[None]))]).astype(
            np.float32
        )
        added = [*self.facts.get("added", ()), {"class": name, **how}]
        return replace(
            self,
            classes=(*self.classes, name),
            vectors=vectors,
            facts={**self.facts, "added": added},
        )

    def without_class(self, name: str) -> ClassBank:
        """Return this bank without a class that was added; any other class is an `EdgekdError`."""
        added = list(self.facts.get("added", ()))
        left = [entry for entry in added if entry["class"] != name]
        if name not in self.classes or len(left) == len(added):
            known = ", ".join(entry["class"] for entry in added) or "none"
            raise EdgekdError(
                f'"{name}" is no class that was added.', f"Added since the export: {known}."
            )
        kept = [place for place, known in enumerate(self.classes) if known != name]
        classes = tuple(self.classes[place] for place in kept)
        return replace(
            self, classes=classes, vectors=self.vectors[kept], facts={**self.facts, "added": left}
        )

    def to_bytes(self) -> bytes:
        """Return the file; equal banks give equal bytes."""
        arrays: dict[str, Any] = {
            "classes": np.array(self.classes, dtype=np.str_),
            "vectors": self.vectors.astype(np.float32),
            "logit_scale": np.float32(self.logit_scale),
        }
        if self.text_mean is not None:
            arrays["text_mean"] = self.text_mean.astype(np.float32)
        about = json.dumps({"format": FORMAT, **self.facts}, ensure_ascii=False, sort_keys=True)
        arrays["about"] = np.array(about)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    def _checked(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        if vectors.ndim != 2 or len(vectors) == 0 or vectors.shape[1] != self.vectors.shape[1]:
            raise EdgekdError(
                f"Vectors {list(vectors.shape)} do not fit into a space of {self.vectors.shape[1]} dimensions.",
                "Take them from the teacher that the artifact names.",
            )
        found = vectors.astype(np.float32)
        if not (np.isfinite(found).all() and (np.linalg.norm(found, axis=1) > 0).all()):
            raise EdgekdError(
                "A vector is zero or not finite, so it has no direction.", "Compute it again."
            )
        return found


def read_bank(path: Path) -> ClassBank:
    """Load the sidecar; a missing or damaged one, or one of another format, is an `EdgekdError`."""
    hint = "Copy the artifact again, or export it again."
    arrays = read_arrays(path, "class bank", hint)
    try:
        about = printable_values(parse_json(str(arrays["about"])))
        mean = arrays.get("text_mean")
        bank = ClassBank(
            tuple(printable(str(name)) for name in arrays["classes"]),
            np.ascontiguousarray(arrays["vectors"], dtype=np.float32),
            float(arrays["logit_scale"]),
            None if mean is None else np.asarray(mean, dtype=np.float32),
            {key: value for key, value in about.items() if key != "format"},
        )
        known = about.get("format") == FORMAT
        added = [str(entry["class"]) for entry in about.get("added", ())]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise EdgekdError(f"{path} is no readable class bank.", hint) from error
    if not known:
        raise EdgekdError(
            f"The class bank {path} has a format that this edgekd does not read.",
            "Use the edgekd that wrote it.",
        )
    shape, mean = bank.vectors.shape, bank.text_mean
    if (
        len(shape) != 2
        or shape[0] != len(bank.classes)
        or min(shape) < 1
        or (mean is not None and mean.shape != shape[1:])
        or not all(np.isfinite(part).all() for part in (bank.vectors, bank.logit_scale))
        or (mean is not None and not np.isfinite(mean).all())
        or not set(added) <= set(bank.classes)
    ):
        raise EdgekdError(f"The arrays of the class bank {path} do not fit together.", hint)
    return bank


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Return vectors at length 1 along the last axis."""
    scaled: NDArray[np.float32] = (
        vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    ).astype(np.float32)
    return scaled
