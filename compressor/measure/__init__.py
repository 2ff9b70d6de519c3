"""Building of engines, and measurement of their parity with torch, quality, latency and memory."""
