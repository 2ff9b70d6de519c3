"""Operators of torch in ONNX: translations of single operators, and decomposition of those without one."""
