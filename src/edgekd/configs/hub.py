"""Options of `edgekd push` and `edgekd pull`."""

from __future__ import annotations

from edgekd.configs.base import AnyPath, Config, option


class PushConfig(Config):
    """An upload to the Hub."""

    model: AnyPath = option(kw_only=False)
    """Run folder (uploads student, exported files and the newest model card) or artifact folder (uploads that file)."""
    repo: str = option(kw_only=False)
    """Repository on the Hub, ORG/NAME; created if it does not exist."""
    private: bool = False
    """Create a private repository."""


class PullConfig(Config):
    """A download from the Hub."""

    repo: str = option(kw_only=False)
    """Repository on the Hub, ORG/NAME."""
    out: AnyPath
    """New folder to write."""
