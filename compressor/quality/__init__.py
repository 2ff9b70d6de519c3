"""Quality of outputs: metrics with bootstrap intervals, parity with torch, divergence from the original."""
