"""edgekd: distil a compact student from a CLIP teacher, export it, and measure the exported file in and out of domain."""

from edgekd.version import __version__

__all__ = ["__version__"]
