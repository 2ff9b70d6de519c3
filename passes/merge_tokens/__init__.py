"""Token merging after attention (ToMe), and propagation of the shorter token axis through the graph."""
