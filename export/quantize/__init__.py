"""INT8: calibration, one quantization scheme per target, and the search for layers to keep in float."""
