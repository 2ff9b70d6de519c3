"""Checkpoints of the model type ``nemotron-nas``: Llama models without single branches, and what engines open them."""
