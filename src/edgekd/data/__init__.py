"""Labelled and unlabelled image sets: reading, splitting, resizing, and the built-in toy images."""
