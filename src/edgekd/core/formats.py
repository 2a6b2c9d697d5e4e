"""Precisions and inputs of exported files, for configurations and manifests."""

from __future__ import annotations

from typing import Literal

Precision = Literal["fp32", "fp16", "int8", "int8-weights", "pal4", "pal6"]
"""`int8`: 8-bit weights and activations on every target. `int8-weights`: only 8-bit weights. `pal4` and `pal6`: weights
as indices into a palette."""
RENAMED = {"w8a8": "int8"}
"""Precision of version 0.1 → its name now."""

Input = Literal["uint8", "float", "picture"]
"""Input of a file: RGB pixels of the student's size, normalised float32 planes, or RGB pixels of any height and width,
which the file resizes."""

MOST_THREADS = 1024
MOST_BATCH = 65_536
"""Limit above any practical use, since a number with an extra digit would run for hours."""

EXACT = ("fp32", "fp16")
"""Precisions that must keep the student's predictions; their parity threshold is fixed."""
