"""What joins runs with the rooms `export` and `targets`: embeddings with class vectors, verification, `edgekd vl`."""
