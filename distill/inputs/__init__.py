"""Inputs of the training loop: views of images, batches, and the cache of teacher embeddings."""
