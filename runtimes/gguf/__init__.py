"""Target `gguf`: GGUF files, run by llama.cpp."""
