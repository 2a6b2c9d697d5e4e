"""Test images, splits and metrics of the WILDS benchmark (Koh et al. 2021) from its own package."""

from __future__ import annotations

import csv
import importlib
import math
import unittest.mock
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgekd.benchmark.subjects import Suite
from edgekd.core.errors import EdgekdError, check_known
from edgekd.core.readers import printable, read_text
from edgekd.data.image_set import ImageSet
from edgekd.data.images import UnreadableImage, content_key, read_bytes
from edgekd.evaluation.class_names import spoken_as
from edgekd.evaluation.suites import left_out
from edgekd.evaluation.trained_on import Trained

PREFIX = "wilds:"
DATASETS = ("camelyon17", "celebA", "domainnet", "fmow", "iwildcam", "rxrx1", "waterbirds")
"""Image classification data sets of WILDS."""
_NOTHING = Trained()
INSIDE = ("id_test", "id_val")
"""Splits of held-out images of the training domains; the first one that exists is used."""


@dataclass(frozen=True)
class _Reader:
    dataset: Any

    def __call__(self, index: int, draft: int | None = None) -> Image.Image:
        image: Image.Image = self.dataset.get_input(index)
        return image.convert("RGB")


def wilds_named(given: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return `wilds:NAME` and `wilds:NAME=DIR` of the `--ood` strings as (name, folder), and the other strings."""
    pairs, others = [], []
    for text in given:
        if not text.startswith(PREFIX):
            others.append(text)
            continue
        name, _, folder = text.removeprefix(PREFIX).partition("=")
        check_known(name, DATASETS, f'WILDS has no image classification data set "{name}".')
        pairs.append((name, folder or "data"))
    return pairs, others


def wilds_suites(
    name: str,
    root: str,
    classes: tuple[str, ...],
    run: str | None = None,
    trained: Trained = _NOTHING,
) -> list[Suite]:
    """Return the official OOD test split, `ood:NAME`, and held-out images of the training domains, `wilds:NAME/SPLIT`.

    The OOD validation split is not used, since WILDS selects models on it. Nothing is downloaded; `root` is the
    `root_dir` of WILDS. Images whose content is in `trained` are left out and counted.

    Raises:
        EdgekdError: the package or the data is missing, or a class is not among `classes`.
    """
    try:
        package = importlib.import_module("wilds")
        dataset = package.get_dataset(dataset=name, root_dir=root, download=False)
    except FileNotFoundError as error:
        raise EdgekdError(
            f"The images of {name} of WILDS are not in {root}.",
            f"Download them as WILDS describes, then give the folder: --ood {PREFIX}{name}=DIR.",
        ) from error
    except ImportError as error:
        raise _lacking(error) from error
    except ValueError as error:
        raise EdgekdError(
            f"WILDS cannot open {name} in {root}: {error}.", "Download it again."
        ) from error
    labels = np.asarray(dataset.y_array, dtype=np.int64).reshape(-1)
    ids = tuple(f"{name}/{index}" for index in range(len(labels)))
    images = ImageSet(
        name=f"WILDS {name}",
        classes=_class_names(dataset, name),
        domains=("all",),
        labels=labels,
        domain_of=np.zeros_like(labels),
        keys=ids,
        ids=ids,
        roles=None,
        reader=_Reader(dataset),
    )
    images = spoken_as(images, classes, name)
    splits: dict[str, int] = dataset.split_dict
    inside = next((split for split in INSIDE if split in splits), None)
    by = f"wilds {getattr(package, '__version__', '')}, {name}.eval".replace(" ,", ",")
    suites = []
    for split, title, place in (
        ("test", f"ood:{name}", "unseen domains"),
        (
            inside,
            f"wilds:{name}/{inside}",
            "held-out images of the training domains of WILDS, in no mean",
        ),
    ):
        indices = np.flatnonzero(np.asarray(dataset.split_array) == splits.get(str(split), -1))
        if split in splits and len(indices):
            keys = _content_keys(dataset, indices) if trained.roles else []
            excluded = trained.excluded(keys)
            if excluded:
                indices = indices[[key not in trained.roles for key in keys]]
            remark = f'the official WILDS split "{split}" of {name} {dataset.version}: {place}.'
            suites.append(
                Suite(
                    title,
                    images,
                    indices,
                    run,
                    "folder",
                    (remark, *left_out(excluded)),
                    own_metrics=_eval(dataset, indices),
                    own_metrics_by=by,
                    excluded=excluded,
                )
            )
    if not suites:
        raise EdgekdError(
            f"{name} of WILDS has no test split.", f"Its splits are {', '.join(splits)}."
        )
    return suites


class _Opened(Exception):
    """Raised with the file that a data set opens for an image."""


def _content_keys(dataset: Any, indices: NDArray[np.int64]) -> list[str]:
    """Return the content key of each image's file, as in `ImageSet.keys`; empty for an image that is not one file.

    The package does not give the path of an image, so `Image.open` is replaced by a function that raises the path.
    """

    def stop(file: Any, *_: Any, **__: Any) -> None:
        raise _Opened(file)

    keys = []
    with unittest.mock.patch("PIL.Image.open", stop):
        for index in indices:
            try:
                dataset.get_input(int(index))
                keys.append("")
            except _Opened as opened:
                try:
                    keys.append(content_key(read_bytes(Path(opened.args[0]))))
                except UnreadableImage as error:
                    raise EdgekdError(
                        f"The WILDS image {printable(str(opened.args[0]))} cannot be read ({error.reason}).",
                        "Download the data set again.",
                    ) from error
    return keys


def _lacking(error: ImportError) -> EdgekdError:
    return EdgekdError(
        f"The package wilds, which reads WILDS, cannot be imported ({error}).",
        "Install it: pip install wilds",
    )


def _eval(
    dataset: Any, indices: NDArray[np.int64]
) -> Callable[[NDArray[np.int64]], dict[str, float]]:
    """Return the data set's metrics of predictions, without NaN values of groups that have no images."""
    import torch

    def metrics(predictions: NDArray[np.int64]) -> dict[str, float]:
        chosen = torch.from_numpy(indices)
        results, _ = dataset.eval(
            torch.from_numpy(predictions.astype(np.int64)),
            torch.as_tensor(dataset.y_array)[chosen],
            dataset.metadata_array[chosen],
        )
        return {
            str(key): float(value) for key, value in results.items() if math.isfinite(float(value))
        }

    return metrics


def _class_names(dataset: Any, name: str) -> tuple[str, ...]:
    """Return the class names, or class numbers if WILDS has no names."""
    count = int(dataset.n_classes)
    if name == "camelyon17":
        return ("normal", "tumor")
    if name == "fmow":
        return tuple(importlib.import_module("wilds.datasets.fmow_dataset").categories)
    table = (
        Path(str(dataset.data_dir)) / "categories.csv"
    )  # iWildCam: columns y and name, among others
    if table.is_file():
        lines = read_text(table, "list of categories").splitlines()
        names = {row.get("y"): row.get("name") for row in csv.DictReader(lines)}
        if all(names.get(str(number)) for number in range(count)):
            return tuple(printable(str(names[str(number)])) for number in range(count))
    return tuple(str(number) for number in range(count))
