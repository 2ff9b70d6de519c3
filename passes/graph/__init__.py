"""The traced graph, its residual sites and the edits of its fx nodes."""
