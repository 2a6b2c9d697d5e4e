"""What an exported file can be: its precisions and inputs, as configurations and manifests name them."""

from __future__ import annotations

from typing import Literal

Precision = Literal["fp32", "fp16", "int8", "int8-weights", "pal4", "pal6"]
"""`int8` is 8-bit weights and activations on every target, `int8-weights` 8-bit weights alone; `pal4` and `pal6` are
weights as indices into a palette."""
RENAMED = {"w8a8": "int8"}
"""Precision of version 0.1 → its name now."""

Input = Literal["uint8", "float", "picture"]
"""What a file takes: RGB pixels of the student's size, which it normalises; float32 planes that are normalised already;
or RGB pixels of any height and width, which it resizes, too."""

MOST_THREADS = 1024
MOST_BATCH = 65_536
"""Above any machine's use; far larger numbers, such as one with a digit too many, would run for hours or hang."""

EXACT = ("fp32", "fp16")
"""Precisions that promise the student's own answers: their threshold is not negotiable."""
