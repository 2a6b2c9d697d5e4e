"""`edgekd fetch`."""

from __future__ import annotations

from edgekd.configs.base import AnyPath, Config, Items, option


class FetchConfig(Config):
    """Weights for a machine without a network."""

    teacher: str = option(kw_only=False)
    """NAME:TAG (open_clip) or hf-hub:ORG/MODEL."""
    students: Items = option(default=(), kw_only=False)
    """Friendly or timm names."""
    to: AnyPath
    """Folder to write into; what it holds already stays as it is."""
