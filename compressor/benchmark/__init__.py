"""`compressor bench`: compare exported folders, ONNX files and torch models side by side."""
