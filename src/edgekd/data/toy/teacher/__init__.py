"""The toy teacher's files: an open_clip model folder written by scripts/make_toy_teacher.py (see made.json)."""
