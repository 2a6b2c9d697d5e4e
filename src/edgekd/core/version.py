"""The version of edgekd."""

__version__ = "0.1.0"
