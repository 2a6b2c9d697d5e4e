"""What joins runs, artifacts and images with the benchmark: subjects, suites, and how they are named."""
