"""Use a finished model: predictions for images, video and cameras, and a local demo page."""
