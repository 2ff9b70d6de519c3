"""Models of transformers that take videos: clips with a fixed number of frames."""
