"""Quantization to int8, int4 and fp16, and the choice between precisions."""
