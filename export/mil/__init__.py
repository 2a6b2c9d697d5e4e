"""A reference evaluator for Core ML programs, which runs where Core ML does not exist."""
