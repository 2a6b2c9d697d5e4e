"""`edgekd predict`, `demo`, `push`, `pull` and `fetch`: models at work, on the Hub, and weights to carry."""

from __future__ import annotations

from edgekd.configs.base import AnyPath, Config, Items, OptionalPath, option
from edgekd.core.formats import MOST_THREADS


class PredictConfig(Config):
    """Predictions for images."""

    model: AnyPath = option(kw_only=False)
    """Run folder (to use its student) or artifact folder (to use the exported file, without torch)."""
    images: Items = option(kw_only=False, min_length=1)
    """Image files, folders, video files, or camera:0."""
    top: int = option(default=5, ge=1)
    """Number of classes to print per image."""
    csv: OptionalPath = option(default=None)
    """New CSV file to write the predictions to."""
    as_json: bool = option(default=False, flag="--json")
    """Print one JSON object per image."""
    annotate: OptionalPath = option(default=None)
    """New folder for copies of the images with their class."""
    every: int = option(default=1, ge=1)
    """Classify every N-th frame of a video or a camera."""
    threads: int | None = option(default=None, ge=1, le=MOST_THREADS)
    """Threads of the exported file's runtime. Default: the runtime's choice."""


class DemoConfig(Config):
    """A local web page to try a model."""

    model: AnyPath = option(kw_only=False)
    """Run folder (for teacher, student and every exported file) or artifact folder."""
    port: int = option(default=8765, ge=0, le=65535)
    """Port on this machine; 0 takes a free one."""


class PushConfig(Config):
    """A model for the Hub."""

    model: AnyPath = option(kw_only=False)
    """Run folder (student, exported files, newest benchmark's model card) or artifact folder (that file alone)."""
    repo: str = option(kw_only=False)
    """ORG/NAME on the Hub; created where it is not there yet."""
    private: bool = False
    """Create it as a private repository."""


class PullConfig(Config):
    """A model from the Hub."""

    repo: str = option(kw_only=False)
    """ORG/NAME on the Hub."""
    out: AnyPath
    """New folder."""


class FetchConfig(Config):
    """Weights for a machine without a network."""

    teacher: str = option(kw_only=False)
    """NAME:TAG (open_clip) or hf-hub:ORG/MODEL."""
    students: Items = option(default=(), kw_only=False)
    """Friendly or timm names."""
    to: AnyPath
    """Folder to write into; what it holds already stays as it is."""
