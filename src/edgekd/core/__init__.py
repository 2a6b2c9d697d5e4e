"""Code shared by all packages: errors, console, files and their safe readers, manifests, preprocessing."""
