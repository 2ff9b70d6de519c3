"""Tracing of loaded models into graphs, and writing of graphs as ONNX files, exported programs or checkpoints."""
