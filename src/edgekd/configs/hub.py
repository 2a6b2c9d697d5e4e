"""`edgekd push` and `edgekd pull`: models on the Hugging Face Hub."""

from __future__ import annotations

from edgekd.configs.base import AnyPath, Config, option


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
