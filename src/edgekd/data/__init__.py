"""Labelled and unlabelled image sets: reading, splitting, resizing, and the embedded toy set."""
