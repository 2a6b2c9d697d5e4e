"""Accuracy of logits: suites predicted, metrics, intervals, detection, corruptions."""
