"""INT8: how each target writes it, and the search for the layers that stay in float."""
