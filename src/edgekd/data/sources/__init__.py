"""Sources of images: folders, manifests, COCO files, WebDataset shards, and `datasets` of Hugging Face."""

from __future__ import annotations

from pathlib import Path

from edgekd.core.errors import EdgekdError
from edgekd.data.sources.checked import readable
from edgekd.data.sources.coco import list_coco
from edgekd.data.sources.hf_datasets import list_table
from edgekd.data.sources.manifests import MANIFESTS, list_manifest
from edgekd.data.sources.scan import CONVENTIONS, Listing, list_all, list_folder
from edgekd.data.sources.shards import list_shards
from edgekd.data.sources.source import Source

HUGGING_FACE = "hf:"


def is_packed(spec: str | Path) -> bool:
    """Return whether a source consists of shards or is a `datasets` name."""
    return str(spec).startswith(HUGGING_FACE) or str(spec).endswith(".tar")


def absolute(spec: str) -> str:
    """Return a packed source with an absolute path if it is local."""
    if not spec.startswith(HUGGING_FACE):
        return spec if "://" in spec else str(Path(spec).expanduser().absolute())
    path, colon, split = spec.removeprefix(HUGGING_FACE).partition(":")
    if Path(path).expanduser().exists():
        path = str(Path(path).expanduser().absolute())
    return f"{HUGGING_FACE}{path}{colon}{split}"


def open_source(spec: str, *, labelled: bool = True) -> Source:
    """Return the readable images of a source, and warn about the others.

    Args:
        spec: a folder, `.csv`, `.parquet`, COCO's `.json`, shards, or `hf:NAME`.
        labelled: whether every image needs a label. If not, labels are ignored, and folders are searched recursively.

    Raises:
        EdgekdError: the source is missing or damaged, does not follow the conventions, or has no readable image.
    """
    if not is_packed(spec):
        return readable(Path(spec), list_files(Path(spec), labelled=labelled))
    if spec.startswith(HUGGING_FACE):
        found = list_table(spec.removeprefix(HUGGING_FACE), labelled=labelled)
    else:
        found = list_shards(spec, labelled=labelled)
    found.left_out.warn(f"images of {spec} left out")
    if not found.entries:
        raise EdgekdError(
            f"{spec} has no readable image.",
            "WebDataset shards have KEY.jpg (or .png, …) next to KEY.cls, .txt or .json.",
        )
    return found


def list_files(path: Path, *, labelled: bool = True) -> Listing:
    """Return the files of a folder, a manifest or a COCO file; arguments and errors as for `open_source`."""
    ending = path.suffix.lower() if path.is_file() else ""
    if path.is_dir():
        return list_folder(path) if labelled else list_all(path)
    if ending in MANIFESTS:
        return list_manifest(path, labelled=labelled)
    if ending == ".json" and labelled:
        return list_coco(path)
    if path.exists():
        raise EdgekdError(f"{path} is a file where a folder is expected.", CONVENTIONS)
    raise EdgekdError(
        f"There is no data at {path}.", "Check the path, or use the built-in data: --data toy."
    )
