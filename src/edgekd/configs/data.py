"""`edgekd data check`."""

from __future__ import annotations

from pathlib import Path

from edgekd.configs.base import AnyPath, Config, Spec, option


class DataCheckConfig(Config):
    """A check of a data set before training."""

    data: Spec = option(kw_only=False)
    """Images, as for edgekd train: a folder, a manifest, shards, …"""
    teacher: str | None = None
    """Teacher that finds near-duplicates and probable label errors. Default: none."""
    near: float = option(default=0.97, gt=0, le=1)
    """Cosine of two mean-centred teacher embeddings from which on images are near-duplicates."""
    sure: float = option(default=0.9, gt=0, lt=1)
    """Zero-shot probability from which on a teacher that contradicts a label is named."""
    out: AnyPath = option(default=Path("data-check.html"))
    """Page to write."""
    overwrite: bool = False
    """Replace an earlier page in --out."""
