"""What the training loop is fed: views of images, batches of them, and the cache of what networks return for them."""
