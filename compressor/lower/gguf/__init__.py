"""GGUF files of rewritten language models: what the format can express, weights and tokenizer."""
