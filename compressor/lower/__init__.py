"""From a loaded model to a traced graph, and from a graph to an ONNX file or a checkpoint."""
