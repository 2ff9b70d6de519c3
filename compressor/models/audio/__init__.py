"""Models of transformers that take sound: their inputs, and the features of clips."""
