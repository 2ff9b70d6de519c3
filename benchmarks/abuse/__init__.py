"""Bad inputs, kills and edited folders: what Compressor does with them. ``python -m benchmarks.abuse`` runs all."""
