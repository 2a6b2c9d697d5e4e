"""Options of `edgekd data check`."""

from __future__ import annotations

from pathlib import Path

from edgekd.configs.base import AnyPath, Config, Spec, option


class DataCheckConfig(Config):
    """A check of a data set before training."""

    data: Spec = option(kw_only=False)
    """Images, as for edgekd train: a folder, a manifest, shards, …"""
    teacher: str | None = None
    """Teacher for finding near-duplicates and probable label errors. Default: none."""
    near: float = option(default=0.97, gt=0, le=1)
    """Minimum cosine of the mean-centred teacher embeddings of near-duplicates."""
    sure: float = option(default=0.9, gt=0, lt=1)
    """Minimum zero-shot probability of another class for a probable label error."""
    out: AnyPath = option(default=Path("data-check.html"))
    """HTML page to write."""
    overwrite: bool = False
    """Replace an earlier page in --out."""
