"""Core ML programs: a reference evaluator for any system, range analysis, and compression."""
