"""The toy teacher's files: an open_clip model folder that scripts/make_toy_teacher.py writes (made.json says how)."""
