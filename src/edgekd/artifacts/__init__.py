"""Joins runs with the packages `export` and `targets`: embeddings with class vectors, verification, `edgekd vl`."""
