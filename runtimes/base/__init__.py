"""Target protocols, target discovery, latency measurement and layer counts."""
