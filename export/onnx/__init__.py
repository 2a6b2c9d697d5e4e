"""ONNX files: written from a network, edited, and evaluated."""
