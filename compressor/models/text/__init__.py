"""Parts of text models: padding, positions, the KV cache, sentence embeddings, and tokens with their places."""
