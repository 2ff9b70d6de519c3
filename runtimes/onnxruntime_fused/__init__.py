"""Target onnxruntime_fused."""
