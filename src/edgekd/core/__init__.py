"""What every room shares: errors, console, files and their safe readers, manifests, preprocessing."""
