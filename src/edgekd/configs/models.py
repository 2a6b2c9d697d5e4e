"""`edgekd predict`, `demo`, `push`, `pull` and `fetch`: models at work, on the Hub, and weights to carry."""

from __future__ import annotations

from edgekd.configs.base import AnyPath, Config, Items, OptionalPath, option
from edgekd.core.formats import MOST_THREADS


class PredictConfig(Config):
    """Predictions for images."""

    model: AnyPath = option(kw_only=False)
    """Run folder (its student) or artifact folder (the exported file; torch is not needed)."""
    images: Items = option(kw_only=False, min_length=1)
    """Image files, folders, video files, or camera:0."""
    top: int = option(default=5, ge=1)
    """Classes to name for each image."""
    csv: OptionalPath = option(default=None)
    """Write them into this new CSV file too."""
    as_json: bool = option(default=False, flag="--json")
    """Print one JSON object for each image."""
    annotate: OptionalPath = option(default=None)
    """Write a copy of each image with its class into this new folder."""
    every: int = option(default=1, ge=1)
    """Of a video or a camera, predict one of so many frames."""
    threads: int | None = option(default=None, ge=1, le=MOST_THREADS)
    """Threads of an exported file's runtime. Default: the runtime's choice."""


class DemoConfig(Config):
    """A local page to try a model on."""

    model: AnyPath = option(kw_only=False)
    """Run folder (teacher, student and every exported file) or artifact folder."""
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
