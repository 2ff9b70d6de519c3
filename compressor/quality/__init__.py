"""Quality of outputs: metrics with intervals, parity with torch, divergence from the original."""
