"""Cut the ONNX file of a whole model into the files of its parts, which other libraries expect."""
