"""Lower precisions: int8, int4 and fp16 files, and the choice among them."""
