"""Target onnxruntime."""
