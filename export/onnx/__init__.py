"""Write, edit and evaluate ONNX files."""
