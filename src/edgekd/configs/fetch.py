"""Options of `edgekd fetch`."""

from __future__ import annotations

from edgekd.configs.base import AnyPath, Config, Items, option


class FetchConfig(Config):
    """Weights for a machine without a network."""

    teacher: str = option(kw_only=False)
    """Teacher: NAME:TAG (open_clip) or hf-hub:ORG/MODEL."""
    students: Items = option(default=(), kw_only=False)
    """Students, by short or timm name."""
    to: AnyPath
    """Folder to write to; existing files in it are not changed."""
