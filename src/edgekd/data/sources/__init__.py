"""Which sources are no folder and no manifest, and how they are opened."""

from __future__ import annotations

from pathlib import Path

from edgekd.core.errors import EdgekdError
from edgekd.data.sources.hf_datasets import list_table
from edgekd.data.sources.shards import list_shards
from edgekd.data.sources.source import Source

HUGGING_FACE = "hf:"


def is_packed(spec: str | Path) -> bool:
    """Return whether a source is shards or a `datasets` name, and no folder or manifest."""
    return str(spec).startswith(HUGGING_FACE) or str(spec).endswith(".tar")


def absolute(spec: str) -> str:
    """Return a packed source with the full path of what lies on this disk."""
    if not spec.startswith(HUGGING_FACE):
        return spec if "://" in spec else str(Path(spec).expanduser().absolute())
    path, colon, split = spec.removeprefix(HUGGING_FACE).partition(":")
    if Path(path).expanduser().exists():
        path = str(Path(path).expanduser().absolute())
    return f"{HUGGING_FACE}{path}{colon}{split}"


def open_packed(spec: str, *, labelled: bool = True) -> Source:
    """List a packed source; images that cannot be read are left out, with one warning.

    Args:
        labelled: every image must have a label.

    Raises:
        EdgekdError: nothing there, a damaged or empty shard, columns of another type, no readable image.
    """
    if spec.startswith(HUGGING_FACE):
        found = list_table(spec.removeprefix(HUGGING_FACE), labelled=labelled)
    else:
        found = list_shards(spec, labelled=labelled)
    found.left_out.warn(f"images of {spec} left out")
    if not found.entries:
        raise EdgekdError(
            f"{spec} holds no image that can be read.",
            "WebDataset shards hold KEY.jpg (or .png, …) with KEY.cls, .txt or .json beside it.",
        )
    return found
