"""Models of transformers by what they take: images, texts, sound, videos, or the texts of an encoder-decoder."""
