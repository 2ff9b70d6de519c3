"""Vision-language models of transformers: a vision tower, a projector and a language model that reads both."""
