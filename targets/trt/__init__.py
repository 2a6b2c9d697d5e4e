"""Build TensorRT engines on a device (part of the device agent)."""
