"""Prepare runs, artifacts and images for the benchmark: subjects and suites; other evaluations of runs."""
