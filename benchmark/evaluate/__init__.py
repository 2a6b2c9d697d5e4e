"""Predictions on suites, and their accuracy: metrics, intervals, detection, corruptions."""
