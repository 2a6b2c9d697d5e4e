"""What all packages share: errors, console, files and their safe readers, manifests, preprocessing."""
