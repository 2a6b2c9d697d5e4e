"""Core ML programs: a reference evaluator that runs where Core ML does not exist, range analysis, and compression."""
