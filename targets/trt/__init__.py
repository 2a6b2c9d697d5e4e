"""What builds a TensorRT engine on a device (the device agent carries this folder)."""
