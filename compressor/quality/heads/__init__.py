"""The heads of models, one module per kind: metric, divergence, expected loss and decisions in one place."""
